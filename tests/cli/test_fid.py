"""`tarflow-fast fid`: the FID of shards and of other data, and statistics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import random_model
from command_lines import Run
from PIL import Image
from torch import Tensor

import tarflow_fast as tff
from tarflow_fast.cli.fid import LINES
from tarflow_fast.errors import DataError
from tarflow_fast.evaluation import (
    Features,
    FeatureSums,
    feature_sums,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    read_statistics,
)
from tarflow_fast.images import to_uint8
from tarflow_fast.sampling.sharded import draw_shards, read_shards


class Small:
    """A small extractor in the place of Inception-v3."""

    device = torch.device("cpu")

    def __init__(self, weights: Any = None, *, device: Any = "cpu"):
        self.name = f"small {weights}"

    def __call__(self, images: Tensor) -> Tensor:
        return self.features(images).pooled

    def features(self, images: Tensor) -> Features:
        x = images.float() / 255
        pooled = torch.cat([x.mean((2, 3)), x.amax((2, 3)), x.square().mean((2, 3))], 1)
        return Features(pooled, x[:, :, :2, :2].flatten(1), 4 * pooled)


@pytest.fixture
def run(command_line: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr("tarflow_fast.evaluation.Inception", Small)
    return command_line


def sample(run: Run, out: str, *how: object) -> None:
    run("sample", "-m", "m.safetensors", "-n", 40, "--out", out, "--shard-size", 16, "--solver", "sequential", *how)


@pytest.mark.parametrize("format", ["npz", "png", "tar"])
@pytest.mark.parametrize("channels", [1, 3])
def test_shards_are_read_back(tmp_path: Path, format: str, channels: int) -> None:
    sampler = tff.Sampler(random_model(in_channels=channels, num_classes=3), solver="sequential")
    with pytest.raises(DataError, match=r"no manifest\.json, which a run has when all its images are there"):
        next(read_shards(tmp_path))
    draw_shards(sampler, tmp_path, 11, [2, 0, 1], shard_size=4, batch_size=4, format=format)
    parts = list(read_shards(tmp_path, batch_size=3))
    assert [len(part) for part in parts] == [3, 1, 3, 1, 3]
    images = to_uint8(sampler.sample(11, [2, 0, 1], batch_size=4).images)
    assert torch.equal(torch.cat(parts), images)
    next(tmp_path.glob(f"00001.{'csv' if format == 'png' else format}")).unlink()
    with pytest.raises(DataError, match="a shard that is missing"):
        list(read_shards(tmp_path))


def test_fid_of_shards(run: Run) -> None:
    sample(run, "a")
    sample(run, "b", "--seed", 1, "--shards", "png")
    assert run("fid", "a", "--save", "a.npz").stdout == "a.npz: statistics of 40 images\n"
    wanted = frechet_distance(feature_sums(read_shards("b"), Small()).gaussian(), read_statistics("a.npz"))
    assert wanted > 0
    assert run("fid", "b", "--stats", "a.npz").stdout.startswith(f"FID  {wanted:.4f}  (40 images; ")
    facts = json.loads(run("fid", "b", "--stats", "a.npz", "--json").stdout)
    assert (facts["fid"], facts["images"]) == (pytest.approx(wanted, rel=1e-12), 40)
    assert json.loads(run("fid", "a", "--stats", "a.npz", "--json").stdout)["fid"] == pytest.approx(0, abs=1e-9)
    assert run("fid", "b", "--stats", "a.npz", "--quiet").output == ""


def test_fid_of_other_data(run: Run) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    np.savez("d.npz", images=pixels)
    Path("d").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(f"d/{i:02d}.png")
    run("fid", "d.npz", "--save", "one.npz")
    run("fid", "d", "--size", 8, "--save", "two.npz")
    one, two = read_statistics("one.npz"), read_statistics("two.npz")
    assert torch.equal(one.mean, two.mean)
    np.testing.assert_allclose(one.mean.numpy(), Small()(torch.from_numpy(pixels).permute(0, 3, 1, 2)).mean(0), 1e-6)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("a",), 2, "nothing to do: give --stats, --reference, --all or --save"),
        (("a", "--save", "a.txt"), 2, "--save: expected a file name ending in .npz or .pth"),
        (("a", "--stats", "none.pth"), 1, "'none.pth': no such file"),
        (("a", "--save", "b.npz", "--size", 8), 2, "--size has no effect on shards"),
        (("none", "--save", "b.npz"), 1, "'none': no such file or folder"),
        (("begun", "--save", "b.npz"), 1, "'begun': no manifest.json"),
    ],
)
def test_refusals(run: Run, options: tuple[object, ...], code: int, message: str) -> None:
    sample(run, "a")
    Path("begun").mkdir()
    Path("begun/job.json").touch()
    np.savez("latent.npz", images=np.random.default_rng(0).normal(size=(4, 4, 8, 8)).astype(np.float32))
    assert message in " ".join(run("fid", *options, code=code).stderr.split())
    assert not Path("b.npz").exists()


def test_all_measures_come_from_one_pass(run: Run) -> None:
    sample(run, "a")
    sample(run, "b", "--seed", 1)
    facts = json.loads(run("fid", "b", "--reference", "a", "--all", "--json", "--save", "b.npz").stdout)
    a, b = (Small().features(torch.cat(list(read_shards(name)))) for name in "ab")
    wanted = {"kid": kernel_distance(b.pooled, a.pooled), "inception_score": inception_score(b.logits)}
    for name, (mean, std) in wanted.items():
        assert (facts[name], facts[f"{name}_std"]) == pytest.approx((mean, std), rel=1e-9)
    assert (facts["precision"], facts["recall"]) == precision_recall(b.pooled, a.pooled)
    spatial = [FeatureSums(4), FeatureSums(4)]
    for sums, features in zip(spatial, (a, b), strict=True):
        sums.add(features.spatial)
    gaussians = [sums.gaussian() for sums in spatial]
    assert facts["sfid"] == pytest.approx(frechet_distance(*gaussians), rel=1e-9)
    run("fid", "a", "--all", "--save", "a.npz")
    again = json.loads(run("fid", "b", "--stats", "a.npz", "--all", "--json").stdout)
    for name in ("fid", "sfid"):
        assert again[name] == pytest.approx(facts[name], rel=1e-9)
    assert "kid" not in again
    lines = run("fid", "b", "--reference", "a", "--all").stdout.splitlines()
    assert [line.split("  ")[0] for line in lines] == list(LINES.values())
    assert set(json.loads(run("fid", "b", "--reference", "a", "--json").stdout)) == {
        "images",
        "fid",
        "saved",
        "seconds",
    }


def test_features_in_the_place_of_images(run: Run) -> None:
    sample(run, "images")
    run("fid", "images", "--all", "--save", "reference.npz")
    sample(run, "again", "--seed", 1)
    text = run(
        "sample",
        "-m",
        "m.safetensors",
        "-n",
        40,
        "--out",
        "features",
        "--shard-size",
        16,
        "--seed",
        1,
        "--shards",
        "features",
        "--solver",
        "sequential",
        "--inception",
        "weights.pth",
    ).stdout
    assert "features: 40 images of 8×8 in 3 shards (features of small weights.pth)" in text
    wanted, found = (
        json.loads(run("fid", name, "--stats", "reference.npz", "--all", "--json").stdout)
        for name in ("again", "features")
    )
    for name in ("fid", "sfid", "inception_score"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-9)
    assert "--size has no effect on shards" in run("fid", "features", "--all", "--size", 8, code=2).stderr
    for how in (("--out", "a.png"), ("--out", "f", "--shards", "npz")):
        assert "--inception has no effect" in run("sample", *how, "--inception", "w.pth", code=2).stderr
