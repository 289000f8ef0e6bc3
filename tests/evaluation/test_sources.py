"""Images of any source are the same from any number on, and what is wrong with a path is told at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cases import random_model
from PIL import Image

import tarflow_fast as tff
from tarflow_fast.errors import ArgumentError, DataError, TarFlowWarning
from tarflow_fast.evaluation import ImageSource, open_images, training_images
from tarflow_fast.images import to_uint8
from tarflow_fast.sampling.sharded import draw_shards

N = 21
PIXELS = np.random.default_rng(0).integers(0, 256, (N, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("d/a").mkdir(parents=True)
    Path("d/b").mkdir()
    for i, image in enumerate(PIXELS):
        Image.fromarray(image).save(f"d/{'ab'[i // 11]}/{i:02d}.png")
    np.savez("d.npz", images=PIXELS)
    return tmp_path


def check(source: ImageSource, wanted: torch.Tensor) -> None:
    assert source.n == len(wanted)
    for size in (1, 8, 100):
        parts = list(source.batches(size))
        assert {len(part) for part in parts[:-1]} <= {size}
        assert torch.equal(torch.cat(parts), wanted)
    for numbers in (range(1), range(3, 13), range(N - 2, N)):
        assert torch.equal(torch.cat(list(source.batches(4, numbers))), wanted[numbers.start : numbers.stop])


@pytest.mark.parametrize("path", ["d", "d.npz"])
def test_pictures_and_arrays(folder: Path, path: str) -> None:
    check(open_images(path, 8), torch.from_numpy(PIXELS).permute(0, 3, 1, 2))


@pytest.mark.parametrize("format", ["npz", "png", "tar"])
def test_shards(folder: Path, format: str) -> None:
    sampler = tff.Sampler(random_model(in_channels=3, num_classes=3), solver="sequential")
    draw_shards(sampler, "shards", N, [2, 0, 1], shard_size=8, batch_size=4, format=format)
    check(open_images("shards"), to_uint8(sampler.sample(N, [2, 0, 1], batch_size=4).images))
    with pytest.raises(ArgumentError, match="size: expected None, as shards have their own"):
        open_images("shards", 8)


def test_training_images(folder: Path) -> None:
    source = training_images("d", 8, seed=3)
    whole = torch.cat(list(source.batches(N)))
    check(source, whole)
    assert not torch.equal(whole, torch.cat(list(training_images("d", 8).batches(N))))


def test_facts_tell_images_apart(folder: Path) -> None:
    one = [open_images("d", 8), open_images("d.npz"), training_images("d", 8)]
    assert [source.facts for source in one] == [open_images("d", 8).facts, open_images("d.npz").facts, one[2].facts]
    others = [open_images("d", 6), training_images("d", 6), training_images("d", 8, seed=1)]
    np.savez("d.npz", images=PIXELS[::-1])
    others.append(open_images("d.npz"))
    Path("d/a/00.png").rename("d/a/000.png")
    others += [open_images("d", 8), training_images("d", 8)]
    assert len({str(source.facts) for source in one + others}) == 9


@pytest.mark.filterwarnings("error")
def test_arrays_of_other_channels_are_no_pictures(tmp_path: Path) -> None:
    np.save(tmp_path / "alpha.npy", np.zeros((3, 4, 4, 2), np.uint8))
    with pytest.raises(ArgumentError, match=r"^images: expected pictures of 1 or 3 channels, got 2 in '.*alpha.npy'$"):
        open_images(tmp_path / "alpha.npy")


def test_a_path_is_told_at_once(folder: Path) -> None:
    Path("empty").mkdir()
    np.savez("latents.npz", images=np.random.default_rng(0).normal(size=(4, 4, 8, 8)).astype(np.float32))
    for path in ("none", "empty"):
        with pytest.raises(DataError, match=path):
            open_images(path, 8)
    with pytest.raises(ArgumentError, match="size: expected pixels along a side"):
        open_images("d")
    with pytest.raises(ArgumentError, match="images: expected pictures"), pytest.warns(TarFlowWarning):
        open_images("latents.npz")
    with pytest.raises(DataError, match="no such folder"):
        training_images("none", 8)
    Path("d/a/bad.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"bad\.png"):
        list(open_images("d", 8).batches(4))
