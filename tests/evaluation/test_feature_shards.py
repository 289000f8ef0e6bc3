"""Shards of features: what is measured of them is what is measured of the images, whoever drew them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import random_model
from torch import Tensor

import tarflow_fast as tff
from tarflow_fast.errors import ArgumentError, DataError
from tarflow_fast.evaluation import (
    Features,
    FeatureSet,
    Gaussian,
    compute_measures,
    feature_format,
    holds_features,
    read_features,
)
from tarflow_fast.images import to_uint8
from tarflow_fast.sampling.sharded import draw_shards, read_shards

N, SIZE = 22, 4


class Small:
    """A small extractor, whose process is killed in its call of that number."""

    device = torch.device("cpu")

    def __init__(self, name: str = "small", killed: int = -1):
        self.name, self.left = name, killed

    def features(self, images: Tensor) -> Features:
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1
        assert torch.get_num_threads() == 1
        x = images.float() / 255
        return Features(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1), x[:, :, :2, :2].flatten(1), x.std((2, 3)))


def draw(out: Path, extractor: Small) -> None:
    sampler = tff.Sampler(random_model(in_channels=3, num_classes=3), solver="sequential", threads=1)
    draw_shards(sampler, out, N, [0, 1, 2], format=feature_format(extractor), shard_size=SIZE, batch_size=2)


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def measured(out: Path) -> dict[str, float]:
    found = FeatureSet(keep=True)
    for part in read_features(out):
        found.add(part)
    assert found.n == N
    return compute_measures(found, statistics=Gaussian(torch.ones(6).double(), torch.eye(6).double()))


def test_they_are_the_features_of_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tarflow_fast.evaluation.feature_shards.IN_A_PASS", 3)
    sampler = tff.Sampler(random_model(in_channels=3, num_classes=3), solver="sequential", threads=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        draw_shards(sampler, tmp_path, N, [0, 1], format=feature_format(Small()), shard_size=9, batch_size=4)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    images = to_uint8(sampler.sample(N, [0, 1], batch_size=4).images)
    wanted, parts = Small().features(images), list(read_features(tmp_path))
    assert [len(part) for part in parts] == [9, 9, 4]
    for kind in ("pooled", "spatial", "logits"):
        torch.testing.assert_close(torch.cat([getattr(part, kind) for part in parts]), getattr(wanted, kind))
    assert holds_features(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".npz", ".json", ""}
    with np.load(tmp_path / "00000.npz") as file:
        assert set(file.files) == {"pooled", "spatial", "logits"}


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX")
@pytest.mark.parametrize("world", [1, 3])
def test_killed_processes_leave_what_one_does(tmp_path: Path, world: int) -> None:
    from runs import fork

    def action(killed: int) -> Callable[[], object]:
        return lambda: draw(tmp_path / "many", Small(killed=killed))

    draw(tmp_path / "one", Small())
    for killed in (2, -1):
        ends = {fork(action(killed), {"RANK": str(rank), "WORLD_SIZE": str(world)}): rank for rank in range(world)}
        codes = {child.wait() for child in ends}
        assert codes <= {0, -signal.SIGKILL}
        assert killed < 0 or -signal.SIGKILL in codes
        assert holds_features(tmp_path / "many") == (codes == {0})
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    one, many = measured(tmp_path / "one"), measured(tmp_path / "many")
    assert many == pytest.approx(one, rel=1e-9)


def test_other_features_are_another_run(tmp_path: Path) -> None:
    draw(tmp_path, Small())
    with pytest.raises(ArgumentError, match="format 'features of small', with which"):
        draw(tmp_path, Small("other"))


def test_images_and_features_are_not_mistaken(tmp_path: Path) -> None:
    draw(tmp_path / "features", Small())
    sampler = tff.Sampler(random_model(in_channels=3), solver="sequential")
    draw_shards(sampler, tmp_path / "images", 3)
    assert not holds_features(tmp_path / "images")
    assert not holds_features(tmp_path)
    with pytest.raises(DataError, match="no images, but features of small"):
        next(read_shards(tmp_path / "features"))
    with pytest.raises(DataError, match="no features, but npz"):
        next(read_features(tmp_path / "images"))
    with pytest.raises(ArgumentError, match="format: expected 'npz' for what is no picture"):
        draw_shards(tff.Sampler(random_model(in_channels=4)), tmp_path / "latents", 3, format=feature_format(Small()))
