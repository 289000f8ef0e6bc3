"""Statistics are read as they were written, by this package and by ml-tarflow's evaluate_fid.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tarflow_fast.errors import ArgumentError
from tarflow_fast.evaluation import FeatureSums, frechet_distance, read_statistics, save_statistics

D = 5


class Network(nn.Linear):
    """A network in the place of Inception-v3. num_features: as torchmetrics wants to know it."""

    num_features = D

    def __init__(self) -> None:
        super().__init__(3, D)

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = super().forward(images.float().mean((2, 3)) / 255)
        return 10 * x


def pictures(seed: int) -> Tensor:
    return torch.randint(0, 256, (30, 3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@torch.no_grad()
def sums(network: Network, seed: int = 0) -> FeatureSums:
    found = FeatureSums(D)
    found.add(network(pictures(seed)))
    return found


@pytest.mark.parametrize("name", ["a.npz", "a.pth"])
def test_they_are_read_back(tmp_path: Path, name: str) -> None:
    network = Network()
    save_statistics(tmp_path / name, sums(network), network)
    found, wanted = read_statistics(tmp_path / name), sums(network).gaussian()
    assert torch.equal(found.mean, wanted.mean)
    assert torch.equal(found.covariance, wanted.covariance)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_ml_tarflow_reads_them(tmp_path: Path) -> None:
    fid = pytest.importorskip("torchmetrics.image.fid")

    class FID(fid.FrechetInceptionDistance):  # type: ignore[misc, name-defined]
        """Their class, which keeps its sums as buffers."""

        def add_state(self, name: str, default: Tensor, *args: Any, **kwargs: Any) -> None:
            self.register_buffer(name, default)

    network = Network()
    save_statistics(tmp_path / "a.pth", sums(network), network)
    theirs = FID(feature=Network(), reset_real_features=False, normalize=True)
    theirs.load_state_dict(torch.load(tmp_path / "a.pth", map_location="cpu", weights_only=True))
    theirs.update(pictures(1), real=False)  # as they are, where the network is not its own
    wanted = frechet_distance(sums(network, 1).gaussian(), sums(network).gaussian())
    assert theirs.compute().item() == pytest.approx(wanted, rel=1e-6)


def test_a_state_has_the_weights(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"network: expected the network, of which a \.pth has the weights"):
        save_statistics(tmp_path / "a.pth", sums(Network()))
    with pytest.raises(ArgumentError, match=r"path: expected a file name ending in \.npz or \.pth"):
        save_statistics(tmp_path / "a.txt", sums(Network()))
    assert list(tmp_path.iterdir()) == []
