"""Images from folders, .npz and IDX files: what was written is what is read, and nothing broken is read at all."""

from __future__ import annotations

import gzip
import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tarflow_fast.data import ImageData, load_images
from tarflow_fast.errors import ArgumentError, DataError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 8, 8), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2], dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def picture(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_folder_has_two_halves(tmp_path: Path, suffix: str) -> None:
    for prefix, n in (("train", 6), ("t10k", 4)):
        put(tmp_path / f"{prefix}-images-idx3-ubyte{suffix}", idx(GREY[:n]))
        put(tmp_path / f"{prefix}-labels-idx1-ubyte{suffix}", idx(LABELS[:n]))
    train, test = load_images(tmp_path), load_images(tmp_path, split="test", size=8)
    assert np.array_equal(train.images[:, 0], GREY)
    assert train.images.shape == (6, 1, 8, 8)
    assert train.labels is not None
    assert train.labels.tolist() == LABELS.tolist()
    assert train.num_classes == 3
    assert len(test) == 4


def test_idx_file_with_and_without_labels(tmp_path: Path) -> None:
    alone = put(tmp_path / "a-images-idx3-ubyte", idx(GREY))
    assert load_images(alone).labels is None
    assert load_images(alone).num_classes == 0
    put(tmp_path / "a-labels-idx1-ubyte.gz", idx(LABELS))
    assert load_images(alone).num_classes == 3
    renamed = put(tmp_path / "b", idx(GREY))
    assert load_images(renamed).labels is None


def test_rectangular_idx(tmp_path: Path) -> None:
    path = put(tmp_path / "a-images-idx3-ubyte", idx(GREY[:, :, :7].copy()))
    assert np.array_equal(load_images(path, size=(8, 7)).images[:, 0], GREY[:, :, :7])
    for size in (8, 7, (7, 8)):
        with pytest.raises(DataError, match="its images are"):
            load_images(path, size=size)
    for where in (path, tmp_path):
        with pytest.raises(ArgumentError, match="layout: expected 'auto'"):
            load_images(where, layout="tokens")


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("train-images.idx3-ubyte", "train-labels.idx1-ubyte"),  # Kaggle's
        ("train-images-idx3-ubyte/train-images-idx3-ubyte", "train-labels-idx1-ubyte/train-labels-idx1-ubyte"),
        ("train-images.idx3-ubyte.gz", "train-labels.idx1-ubyte.gz"),
        ("raw/train-images-idx3-ubyte", "raw/train-labels-idx1-ubyte"),
        ("MNIST/raw/train-images-idx3-ubyte", "MNIST/raw/train-labels-idx1-ubyte"),  # torchvision's
    ],
)
def test_other_peoples_idx_names(tmp_path: Path, images: str, labels: str) -> None:
    put(tmp_path / images, idx(GREY))
    put(tmp_path / labels, idx(LABELS))
    for path in (tmp_path, tmp_path / images):
        data = load_images(path)
        assert np.array_equal(data.images[:, 0], GREY)
        assert data.labels is not None
        assert data.labels.tolist() == LABELS.tolist()
    with pytest.raises(DataError, match="has no t10k-images"):
        load_images(tmp_path, split="test")


def test_several_idx_data_sets(tmp_path: Path) -> None:
    for name in ("MNIST", "FashionMNIST"):
        put(tmp_path / name / "raw" / "train-images-idx3-ubyte", idx(GREY))
    with pytest.raises(DataError, match="several data sets"):
        load_images(tmp_path)
    assert len(load_images(tmp_path / "MNIST")) == 6


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_headers_that_lie(tmp_path: Path, suffix: str) -> None:
    """Before memory is taken."""
    content = bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**32 - 1, 2**16, 2**16) + bytes(100)
    with pytest.raises(DataError, match="its header says"):
        load_images(put(tmp_path / f"x-images-idx3-ubyte{suffix}", content))


def test_idx_at_odds(tmp_path: Path) -> None:
    images = put(tmp_path / "train-images-idx3-ubyte", idx(GREY))
    with pytest.raises(DataError, match="has no t10k-images"):
        load_images(tmp_path, split="test")
    with pytest.raises(DataError, match="8 pixels wide, not 16"):
        load_images(images, size=16)
    put(tmp_path / "train-labels-idx1-ubyte", idx(LABELS[:5]))
    with pytest.raises(DataError, match="expected 6 integer labels"):
        load_images(images)
    put(tmp_path / "train-labels-idx1-ubyte", idx(GREY))
    with pytest.raises(DataError, match="in 1 dimensions, got type 8 in 3 dimensions"):
        load_images(images)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "not an IDX file"),
        (bytes([0, 0, 13, 3]) + bytes(12), "got type 13"),
        (idx(GREY)[:-1], "its header says"),
        (idx(GREY) + b"\0", "its header says"),
        (idx(GREY[:0]), "none|uint8 \\(N"),
    ],
)
def test_foreign_idx(tmp_path: Path, content: bytes, message: str) -> None:
    for name in ("x-images-idx3-ubyte", "x-images-idx3-ubyte.gz"):
        with pytest.raises(DataError, match=message):
            load_images(put(tmp_path / name, content))


@given(kept=st.integers(0, 10_000))
def test_truncated_files(tmp_path_factory: pytest.TempPathFactory, kept: int) -> None:
    folder = tmp_path_factory.mktemp("cut")
    packed = gzip.compress(idx(GREY), mtime=0)
    archive = npz(images=GREY, labels=LABELS)
    for name, content in (("a.gz", packed), ("a.npz", archive)):
        path = folder / name
        path.write_bytes(content[: kept % len(content)])
        with pytest.raises(DataError):
            load_images(path)


@given(place=st.integers(0, 10_000), value=st.integers(1, 255), kind=st.sampled_from(["gz", "npz", "png"]))
def test_damaged_files(tmp_path_factory: pytest.TempPathFactory, place: int, value: int, kind: str) -> None:
    """A flipped byte is found, or does no harm (as in a time stamp): never another error, never a wrong image."""
    folder = tmp_path_factory.mktemp("flip")
    if kind == "png":
        content = bytearray(picture(folder / "a" / "1.png", COLOUR[0]).read_bytes())
    else:
        content = bytearray(gzip.compress(idx(GREY), mtime=0) if kind == "gz" else npz(images=GREY))
    content[place % len(content)] ^= value
    path = put(folder / "a" / "1.png", bytes(content)) if kind == "png" else folder / f"a.{kind}"
    path.write_bytes(bytes(content))
    try:
        data = load_images(folder if kind == "png" else path, size=8)
    except DataError:
        return
    if kind != "png":  # a PNG's palette, gamma and the like may lawfully change its pixels
        assert np.array_equal(data.images[:, 0], GREY)


@pytest.mark.parametrize("array", [GREY, GREY[..., None], COLOUR])
def test_npz(tmp_path: Path, array: np.ndarray) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, images=array, labels=LABELS.astype(np.int32), class_names=np.array(["a", "b", "c", "d"]))
    data = load_images(path, size=8)
    assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), array.reshape(6, 8, 8, -1))
    assert data.class_names == ("a", "b", "c", "d")
    assert data.num_classes == 4
    np.savez(path, images=array)
    assert load_images(path).labels is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": GREY}, "expected an array 'images', found pictures"),
        ({"images": GREY[..., None] - 100.0}, "float64 images from -100 to 155: say what is black"),
        ({"images": GREY[0]}, "got uint8 \\(8, 8\\)"),
        ({"images": COLOUR.repeat(2, -1)[:, :7]}, "has neither 1 or 3 channels nor square images.*give layout"),
        ({"images": GREY, "labels": LABELS[:2]}, "expected 6 integer labels"),
        ({"images": GREY, "labels": LABELS.astype(np.float32)}, "got float32"),
        ({"images": GREY, "labels": LABELS.astype(np.int64) - 1}, "labels >= 0"),
        ({"images": GREY, "labels": LABELS, "class_names": np.array(["a"])}, "labels up to 2"),
        ({"images": np.array([{}])}, "plain arrays"),
    ],
)
def test_npz_of_other_things(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=message):
        load_images(path)


def test_npz_by_name_only(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", GREY)
    (tmp_path / "x.npy").rename(tmp_path / "x.npz")
    with pytest.raises(DataError, match=r"not a \.npz file"):
        load_images(tmp_path / "x.npz")


def test_folder_of_pictures(tmp_path: Path) -> None:
    picture(tmp_path / "dog" / "1.png", COLOUR[0])
    picture(tmp_path / "dog" / "2.png", COLOUR[1])
    picture(tmp_path / "cat" / "9.png", COLOUR[2])
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "cat" / ".DS_Store").touch()
    data = load_images(tmp_path, size=8, split="test")
    assert data.class_names == ("cat", "dog")
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1, 1]
    assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), COLOUR[[2, 0, 1]])
    grey = load_images(tmp_path, size=8, channels=1)
    assert grey.images.shape == (3, 1, 8, 8)
    with pytest.raises(ArgumentError, match="size"):
        load_images(tmp_path)


def test_folder_with_halves(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "cat" / "1.png", COLOUR[0])
    picture(tmp_path / "test" / "cat" / "1.png", COLOUR[1])
    for split, pixels in (("train", COLOUR[0]), ("test", COLOUR[1])):
        data = load_images(tmp_path, split=split, size=8)
        assert np.array_equal(data.images[0].permute(1, 2, 0).numpy(), pixels)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 48), (9, 25)])
def test_pictures_keep_their_centre(tmp_path: Path, shape: tuple[int, int]) -> None:
    """The middle third of a picture is white, the rest black: after resizing and cropping all is white."""
    pixels = np.zeros(shape, np.uint8)
    long = int(np.argmax(shape))
    third = slice(shape[long] // 3, -(shape[long] // 3))
    pixels[(third, slice(None)) if long == 0 else (slice(None), third)] = 255
    picture(tmp_path / "a" / "1.png", pixels)
    data = load_images(tmp_path, size=8, channels=1)
    assert int(data.images[..., 1:-1, 1:-1].min()) > 250


@pytest.mark.parametrize("size", [(8, 12), (12, 8), (3, 12), (8, 8)])
@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (9, 40), (30, 30)])
def test_pictures_cover_a_rectangle(tmp_path: Path, size: tuple[int, int], shape: tuple[int, int]) -> None:
    """A picture is resized until it just covers the size: the part of its middle that has the size's proportions is
    white, the rest black, and after cropping all is white."""
    scale = max(wanted / there for wanted, there in zip(size, shape, strict=True))
    margins = [int((there - wanted / scale) / 2) for wanted, there in zip(size, shape, strict=True)]
    pixels = np.zeros(shape, np.uint8)
    pixels[tuple(slice(margin, there - margin) for margin, there in zip(margins, shape, strict=True))] = 255
    picture(tmp_path / "a" / "1.png", pixels)
    data = load_images(tmp_path, size=size, channels=1)
    assert data.images.shape == (1, 1, *size)
    inner = data.images[0, 0, 1:-1, 1:-1]
    assert int(inner.min()) > 250


def test_rectangles_of_the_pictures_own_size(tmp_path: Path) -> None:
    picture(tmp_path / "a" / "1.png", COLOUR[0, :5])
    assert np.array_equal(load_images(tmp_path, size=(5, 8)).images[0].permute(1, 2, 0), COLOUR[0, :5])
    for size in ((5, 8, 3), (5,), (0, 8), (5, 8.0), "5x8"):
        with pytest.raises(ArgumentError, match="size: expected an integer"):
            load_images(tmp_path, size=size)  # type: ignore[arg-type]


def test_folders_of_other_things(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_images(tmp_path / "absent")
    with pytest.raises(DataError, match="one sub-folder of pictures"):
        load_images(tmp_path, size=8)
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="a class without pictures"):
        load_images(tmp_path, size=8)
    file = tmp_path / "cat" / "notes.txt"
    file.write_text("meow")
    with pytest.raises(DataError, match=r"a class without pictures; not a picture: 'notes\.txt'"):
        load_images(tmp_path, size=8)
    file.rename(tmp_path / "cat" / "1.jpg")
    with pytest.raises(DataError, match="not a whole picture"):
        load_images(tmp_path, size=8)


@pytest.mark.parametrize(
    ("argument", "value"), [("split", "valid"), ("size", 0), ("size", 8.0), ("size", True), ("channels", 4)]
)
def test_bad_arguments(tmp_path: Path, argument: str, value: object) -> None:
    path = put(tmp_path / "x-images-idx3-ubyte", idx(GREY))
    with pytest.raises(ArgumentError, match=argument):
        load_images(path, **{argument: value})  # type: ignore[arg-type]


def test_image_data_refuses_what_does_not_fit() -> None:
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 1])
    assert ImageData(images, labels, ("a", "b", "c")).num_classes == 3
    for bad in (images.int(), images[0], images[:0], images[:, 0], images[..., None], images.float() / 0):
        with pytest.raises(ArgumentError, match="images"):
            ImageData(bad)
    for wrong in (labels.int(), labels[:3], labels - 1):
        with pytest.raises(ArgumentError, match="labels"):
            ImageData(images, wrong)
    with pytest.raises(ArgumentError, match="class_names"):
        ImageData(images, labels, ("a", "b"))


def test_any_number_of_channels_and_data_that_are_no_pictures() -> None:
    assert ImageData(torch.zeros(4, 7, 8, 8, dtype=torch.uint8)).images.shape[1] == 7
    assert ImageData(torch.randn(4, 7, 8, 8)).num_classes == 0
    assert ImageData(torch.zeros(4, 1, 8, 5, dtype=torch.uint8)).images.shape[2:] == (8, 5)
    assert ImageData(torch.randn(4, 7, 5), torch.arange(4)).sequences
    assert not ImageData(torch.randn(4, 7, 5, 5)).sequences
    for shape in ((1, 4, 8, 8), (1, 8, 8)):
        with pytest.raises(ArgumentError, match="finite"):
            ImageData(torch.full(shape, torch.nan))


def test_spread_and_fingerprint() -> None:
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    data = ImageData(images, torch.arange(10))
    assert data.spread(4).images.flatten().tolist() == [0, 2, 5, 7]
    assert data.spread(4).labels is not None
    assert data.spread(11) is data
    with pytest.raises(ArgumentError, match="limit"):
        data.spread(0)
    assert data.fingerprint == ImageData(images.clone(), torch.arange(10)).fingerprint
    assert data.fingerprint != ImageData(images, torch.arange(10).flip(0)).fingerprint
    assert data.fingerprint != ImageData(images.flip(0), torch.arange(10)).fingerprint
