"""The Fréchet distance of features: against other formulas and torchmetrics, and what statistics are read from."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tarflow_fast.devices import torch_threads
from tarflow_fast.errors import ArgumentError, BackendError, DataError
from tarflow_fast.evaluation import (
    FeatureSums,
    Gaussian,
    Inception,
    compute_features,
    feature_sums,
    frechet_distance,
    read_spatial_statistics,
    read_statistics,
)

D = 12


class Small(torch.nn.Module):
    """A small extractor: 12 features of images (B, 3, 8, 8) uint8, none of them trivial."""

    num_features = D

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = torch.randn(3 * 64, D, generator=generator) / 14

    def forward(self, images: Tensor) -> Tensor:
        x = images.float().flatten(1) / 127.5 - 1
        return torch.relu(x @ self.weight[: x.shape[1]]) + 0.1


def pictures(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(n, 1, 1, 1, generator=generator) * (60 + 20 * seed)
    return (low + 120 * torch.rand(n, 3, 8, 8, generator=generator)).to(torch.uint8)


def gaussian(n: int = 300, seed: int = 0) -> Gaussian:
    return feature_sums(pictures(n, seed).split(64), Small()).gaussian()


def test_sums_are_the_mean_and_covariance() -> None:
    features = Small()(pictures(300, 0)).double().numpy()
    found = gaussian()
    np.testing.assert_allclose(found.mean.numpy(), features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance.numpy(), np.cov(features.T), rtol=1e-9, atol=1e-12)


def test_distributed_sums_are_those_of_one_process() -> None:
    images, whole = pictures(301, 0), FeatureSums(D)
    for part in images.tensor_split(5):
        whole.merge(feature_sums(part.split(7), Small()))
    one = feature_sums(images.split(64), Small())
    assert whole.n == one.n == 301
    reference = gaussian(seed=1)
    a, b = (frechet_distance(sums.gaussian(), reference) for sums in (whole, one))
    assert a == pytest.approx(b, rel=1e-9)


def test_it_is_the_distance_of_gaussians() -> None:
    """tr (Σ_a Σ_b)^½ = tr (Σ_a^½ Σ_b Σ_a^½)^½, whose eigenvalues are those of a symmetric matrix."""
    a, b = gaussian(seed=0), gaussian(200, seed=1)
    values, vectors = torch.linalg.eigh(a.covariance)
    half = vectors @ (values.clamp(min=0).sqrt()[:, None] * vectors.T)
    root = torch.linalg.eigvalsh(half @ b.covariance @ half).clamp(min=0).sqrt().sum()
    wanted = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * root
    assert frechet_distance(a, b) == pytest.approx(wanted.item(), rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(wanted.item(), rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    shifted = Gaussian(a.mean + 2, a.covariance)
    assert frechet_distance(a, shifted) == pytest.approx(4 * D, rel=1e-9)


def test_fewer_images_than_features_have_a_distance() -> None:
    assert 0 < frechet_distance(gaussian(5), gaussian(6, seed=1)) < 1e4


def their_fid(**how: Any) -> Any:
    """Returns ml-tarflow's FID class with our extractor."""
    fid = pytest.importorskip("torchmetrics.image.fid")

    class FID(fid.FrechetInceptionDistance):  # type: ignore[misc, name-defined]
        def add_state(self, name: str, default: Tensor, *args: Any, **kwargs: Any) -> None:
            self.register_buffer(name, default)

    return FID(feature=Small(), reset_real_features=False, **how)


def test_torchmetrics_and_ml_tarflow_agree(tmp_path: Path) -> None:
    theirs = their_fid()
    theirs.update(pictures(300, 0), real=True)
    torch.save(theirs.state_dict(), tmp_path / "stats.pth")
    theirs.update(pictures(200, 1), real=False)
    ours = frechet_distance(gaussian(200, seed=1), read_statistics(tmp_path / "stats.pth"))
    assert ours == pytest.approx(theirs.compute().item(), rel=1e-6)


def state(n: int = 300) -> dict[str, Tensor]:
    """Returns what torchmetrics' FID has in its state dict, of which ml-tarflow's *_fid_stats.pth are made."""
    sums = feature_sums(pictures(n, 0).split(64), Small())
    return {
        "real_features_sum": sums.sum,
        "real_features_cov_sum": sums.outer,
        "real_features_num_samples": torch.tensor(sums.n),
        "fake_features_sum": torch.full((D,), torch.nan),
        "inception.Conv2d_1a_3x3.conv.weight": torch.full((4, 3), torch.nan),
    }


@pytest.mark.parametrize("legacy", [False, True])
def test_statistics_of_ml_tarflow(tmp_path: Path, legacy: bool) -> None:
    torch.save(state(), tmp_path / "stats.pth", _use_new_zipfile_serialization=not legacy)
    found, wanted = read_statistics(tmp_path / "stats.pth"), gaussian()
    assert torch.equal(found.mean, wanted.mean)
    assert torch.equal(found.covariance, wanted.covariance)


def test_statistics_of_adm_and_our_own(tmp_path: Path) -> None:
    wanted = gaussian()
    np.savez(tmp_path / "adm.npz", mu=wanted.mean.numpy(), sigma=wanted.covariance.numpy(), mu_s=np.zeros(3))
    wanted.save(tmp_path / "own.npz")
    for name in ("adm", "own"):
        found = read_statistics(tmp_path / f"{name}.npz")
        assert torch.equal(found.mean, wanted.mean)
        assert torch.equal(found.covariance, wanted.covariance)


class _Hostile:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def test_spatial_statistics(tmp_path: Path) -> None:
    pooled, spatial = gaussian(), gaussian(seed=1)
    pooled.save(tmp_path / "both.npz", spatial)
    pooled.save(tmp_path / "one.npz")
    found = read_spatial_statistics(tmp_path / "both.npz")
    assert found is not None
    assert torch.equal(found.mean, spatial.mean)
    assert torch.equal(found.covariance, spatial.covariance)
    assert torch.equal(read_statistics(tmp_path / "both.npz").mean, pooled.mean)
    assert read_spatial_statistics(tmp_path / "one.npz") is None
    assert read_spatial_statistics(tmp_path / "a.pth") is None


def test_no_pickle_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({**state(), "hook": _Hostile()}, "stats.pth")
    assert torch.equal(read_statistics("stats.pth").mean, gaussian().mean)
    np.savez("a.npz", mu=np.array([_Hostile()]), sigma=np.zeros((1, 1)))
    with pytest.raises(DataError, match=r"no readable \.npz file"):
        read_statistics("a.npz")
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.npz", b"no archive", "no readable .npz file"),
        ("a.pth", b"", "empty"),
        ("a.pth", b"text", "not a readable"),
        ("a.pth", pickle.dumps([1]), "a.pth"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, content: bytes, match: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=match):
        read_statistics(tmp_path / name)


def test_what_is_not_statistics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_statistics(tmp_path / "none.pth")
    np.savez(tmp_path / "a.npz", arr_0=np.zeros(3))
    with pytest.raises(DataError, match="which are called mu and sigma"):
        read_statistics(tmp_path / "a.npz")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "a.pth")
    with pytest.raises(DataError, match="which has real_features_num_samples"):
        read_statistics(tmp_path / "a.pth")
    torch.save({**state(), "real_features_sum": torch.zeros(3)}, tmp_path / "a.pth")
    with pytest.raises(DataError, match="do not go together"):
        read_statistics(tmp_path / "a.pth")
    np.savez(tmp_path / "b.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    with pytest.raises(ArgumentError, match="a covariance"):
        read_statistics(tmp_path / "b.npz")
    np.savez(tmp_path / "b.npz", mu=np.full(2, np.nan), sigma=np.zeros((2, 2)))
    with pytest.raises(ArgumentError, match="statistics: expected finite values"):
        read_statistics(tmp_path / "b.npz")


def test_wrong_features_are_refused() -> None:
    with pytest.raises(ArgumentError, match="images: expected at least two"):
        feature_sums([], Small())
    with pytest.raises(ArgumentError, match="images: expected at least two"):
        feature_sums(pictures(1, 0).split(1), Small()).gaussian()
    with pytest.raises(ArgumentError, match="features: expected finite values"):
        feature_sums(pictures(4, 0).split(2), lambda images: torch.full((len(images), D), torch.nan))
    with pytest.raises(ArgumentError, match=r"features: expected shape \(B, 12\)"):
        FeatureSums(D).add(torch.zeros(2, 3))
    with pytest.raises(ArgumentError, match="statistics: expected features of 12 values"):
        frechet_distance(gaussian(), Gaussian(torch.zeros(3), torch.eye(3)))


def test_without_the_library_one_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(BackendError, match=r"pip install 'tarflow_fast\[fid\]' brings it"):
        Inception()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights, as the real ones are nowhere in the tests."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    folder = tmp_path_factory.mktemp("weights")
    made: dict[str, Tensor] = {}

    class Random(module.FeatureExtractorInceptionV3):  # type: ignore[misc, name-defined]
        def load_state_dict(self, *args: Any, **how: Any) -> Any:
            made.update(self.state_dict())

    torch.save({}, folder / "empty.pth")
    Random("random", ["2048"], feature_extractor_weights_path=str(folder / "empty.pth"))
    torch.save(made, folder / "weights.pth")
    return folder / "weights.pth"


def test_weights_are_read_when_features_are_wanted(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BackendError, match="no such file"):
        Inception("none.pth")
    Path("bad.pth").write_bytes(b"no weights")
    bad = Inception("bad.pth")
    for _ in range(2):
        with pytest.raises(BackendError, match=r"weights of Inception-v3 are not in 'bad.pth'"):
            bad(pictures(2, 0))
    torch.save({"hook": _Hostile()}, "evil.pth")
    with pytest.raises(BackendError, match=r"weights of Inception-v3 are not in 'evil.pth'"):
        Inception("evil.pth").name  # noqa: B018
    assert not Path("ran").exists()


def test_nothing_is_downloaded_unless_that_is_asked_for(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def fetch(url: str, to: str, start: str, progress: bool) -> None:
        asked.append(f"{url} {start}")
        Path(to).write_bytes(weights.read_bytes())

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    with pytest.raises(BackendError, match=r"is not in its cache, .*hub.*; weights=… or --inception FILE names it"):
        Inception()
    wanted = Inception(download=True)
    assert asked == []
    name = wanted.name
    assert len(asked) == 1
    assert asked[0].endswith("weights-inception-2015-12-05-6726825d.pth 6726825d")  # and the start of its SHA-256
    assert Inception().name == Inception(download=True).name == name
    assert len(asked) == 1


def test_features_are_those_of_torch_fidelity(weights: Path) -> None:
    module = sys.modules["torch_fidelity.feature_extractor_inceptionv3"]
    images = pictures(3, 0)
    layers = ["2048", "logits_unbiased"]
    network = module.FeatureExtractorInceptionV3("theirs", layers, feature_extractor_weights_path=str(weights))
    seen: list[Tensor] = []
    network.Mixed_6d.register_forward_hook(lambda _, __, out: seen.append(out))
    theirs, logits = network(images)
    ours = Inception(weights)
    assert torch.equal(ours(images), theirs)
    assert theirs.shape == (3, 2048)
    found = ours.features(images)
    assert torch.equal(found.pooled, theirs)
    assert torch.equal(found.logits, logits)
    spatial = found.spatial.reshape(3, 17, 17, 7).permute(0, 3, 1, 2)
    assert torch.equal(spatial, seen[0][:, :7])  # the first of the layers whose outputs are joined there
    assert torch.equal(ours.features(images).spatial, found.spatial)
    grey = images[:, :1]
    assert torch.equal(ours(grey), ours(grey.repeat(1, 3, 1, 1)))
    name = ours.name
    with torch.no_grad():
        next(ours.network.parameters()).add_(1)
    del ours.name
    assert name.startswith("inception-v3-compat (")
    assert ours.name != name


def test_passes_at_once_give_what_one_gives(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, though each is on a thread of its own."""
    monkeypatch.setattr("tarflow_fast.evaluation.feature_shards.own_cores", lambda: 3)
    network, parts, threads = Inception(weights), pictures(5, 0).split(1), torch.get_num_threads()
    found = list(compute_features(parts, network))
    assert torch.get_num_threads() == threads
    with torch_threads(1):
        wanted = [network.features(part) for part in parts]
    for kind in ("pooled", "spatial", "logits"):
        assert torch.equal(torch.cat([getattr(f, kind) for f in found]), torch.cat([getattr(w, kind) for w in wanted]))
