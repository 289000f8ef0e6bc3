"""Pictures are prepared as torchvision's transforms and torchmetrics prepare them for ml-tarflow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tarflow_fast.data import centre_crops, find_below
from tarflow_fast.data.centre_crops import centre_crop, levels
from tarflow_fast.errors import DataError

SIZES = [(8, 8), (8, 13), (13, 8), (17, 31), (5, 9), (40, 21), (9, 8), (8, 11), (11, 8)]  # height and width


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, (height, width) in enumerate(SIZES):
        place = tmp_path / f"class{i % 2}" / ("deep" if i > 4 else "")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(height, width, i)).save(place / f"{i}.{'PNG' if i % 3 else 'bmp'}")
    (tmp_path / "class0/notes.txt").write_text("no picture")
    return tmp_path


def test_all_pictures_below_are_found(folder: Path) -> None:
    names = [Path(path).relative_to(folder).as_posix() for path in find_below(folder)]
    assert names == sorted(names)
    assert {name.rpartition("/")[2].partition(".")[0] for name in names} == set("012345678")
    (folder / "empty").mkdir()
    for path, message in (("none", "no such folder"), ("class0/notes.txt", "no such folder"), ("empty", "no pictures")):
        with pytest.raises(DataError, match=message):
            find_below(folder / path)


@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_middle(tmp_path: Path, size: tuple[int, int]) -> None:
    """Without a resize of the shorter side it is a slice; halves are rounded to the even number."""
    height, width = size
    Image.fromarray(picture := pixels(height, width)).save(tmp_path / "a.png")
    side = min(size)
    top, left = round((height - side) / 2), round((width - side) / 2)
    found = centre_crop(str(tmp_path / "a.png"), side)
    np.testing.assert_array_equal(found, picture[top : top + side, left : left + side].transpose(2, 0, 1))


def test_the_shorter_side_gets_the_size(tmp_path: Path) -> None:
    """By bilinear interpolation over all that an output pixel covers; the longer side is cut off, not rounded."""
    Image.fromarray(picture := pixels(31, 17)).save(tmp_path / "a.png")
    wanted = Image.fromarray(picture).resize((8, 14), Image.Resampling.BILINEAR)  # 8 · 31 / 17 = 14.59
    np.testing.assert_array_equal(centre_crop(str(tmp_path / "a.png"), 8), np.asarray(wanted)[3:11].transpose(2, 0, 1))


def test_transparency_and_orientation_are_ignored(tmp_path: Path) -> None:
    clear = np.dstack([pixels(8, 8), np.zeros((8, 8, 1), np.uint8)])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(clear).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(centre_crop(str(tmp_path / "a.png"), 8), clear[..., :3].transpose(2, 0, 1))


def test_torchvision_agrees(folder: Path) -> None:
    try:
        from torchvision import transforms
        from torchvision.datasets import ImageFolder
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
        pytest.skip(str(error))
    steps = [
        transforms.Resize(8),
        transforms.CenterCrop(8),
        transforms.ToTensor(),
        transforms.Normalize((0.5,), (0.5,)),
    ]
    theirs = ImageFolder(str(folder), transform=transforms.Compose(steps))
    assert sorted(path for path, _ in theirs.samples) == find_below(folder)
    for (path, _), (x, _) in zip(theirs.samples, theirs, strict=True):
        wanted = (0.5 * (x + 1) * 255).byte()
        found = levels()[torch.from_numpy(centre_crop(path, 8).copy()).long()]
        assert torch.equal(found, wanted)


def test_levels_lose_what_fp32_cuts_off() -> None:
    found = levels().int()
    lost = torch.arange(256) - found
    assert set(lost.tolist()) == {0, 1}
    for v in (1, 77, 128, 255):  # one at a time, in numpy
        x = (np.float32(v) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
        assert found[v] == int(np.float32(0.5) * (x + np.float32(1)) * np.float32(255))


def crops(paths: list[str], numbers: range, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.stack(list(centre_crops(paths, 8, numbers, seed))))


def test_half_of_them_are_mirrored(folder: Path) -> None:
    paths = find_below(folder) * 30
    every = range(len(paths))
    whole = crops(paths, every)
    plain = torch.stack([levels()[torch.from_numpy(centre_crop(p, 8).copy()).long()] for p in paths])
    mirrored = (whole == plain.flip(3)).flatten(1).all(1)
    assert torch.equal((whole == plain).flatten(1).all(1), ~mirrored)
    assert 90 < int(mirrored.sum()) < 180  # of 270
    for part in (range(1), range(3, 20), range(260, 270)):
        assert torch.equal(crops(paths, part), whole[part.start : part.stop])
    assert not torch.equal(crops(paths, every, seed=1), whole)


def test_a_file_that_is_no_picture_is_named(folder: Path) -> None:
    (folder / "class1/bad.png").write_bytes(b"no picture")
    paths = find_below(folder)
    with pytest.raises(DataError, match=r"bad\.png': no picture that can be read"):
        list(centre_crops(paths, 8, range(len(paths))))
