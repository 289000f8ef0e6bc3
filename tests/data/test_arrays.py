"""`.npz` and `.npy` files in the layouts, ranges and under the names that people give them."""

from __future__ import annotations

import contextlib
import io
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from remarks import Remarks

from tarflow_fast.data import ImageData, load_images
from tarflow_fast.data.labels import read_labels
from tarflow_fast.data.values import channel_axis
from tarflow_fast.errors import ArgumentError, DataError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 8, 8), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
COLOUR[0, 0, 0] = (0, 255, 128)
NCHW = COLOUR.transpose(0, 3, 1, 2)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def load(path: Path, arrays: dict[str, Any] | None = None, **how: Any) -> ImageData:
    if arrays is not None:
        np.savez(path, **arrays)
    return load_images(path, **how)


@pytest.mark.parametrize(
    "arrays",
    [
        {"images": COLOUR, "labels": LABELS},
        {"images": NCHW, "y": LABELS},
        {"arr_0": COLOUR, "arr_1": LABELS},
        {"arr_0": np.asfortranarray(NCHW), "arr_1": LABELS[:, None]},
        {"X": COLOUR, "Y": LABELS.astype(np.uint16)},
        {"data": COLOUR, "labels": LABELS.astype(">i4")},
        {"samples": COLOUR, "labels": np.eye(3)[LABELS]},
    ],
)
def test_names_and_layouts(tmp_path: Path, arrays: dict[str, Any]) -> None:
    data = load(tmp_path / "x.npz", arrays)
    assert np.array_equal(data.images.numpy(), NCHW)
    assert data.images.is_contiguous()
    assert data.labels is not None
    assert data.labels.tolist() == LABELS.tolist()
    assert (data.num_classes, data.names) == (3, None)


@pytest.mark.parametrize("names", [("{}_images", "{}_labels"), ("x_{}", "y_{}"), ("X_{}", "Y_{}"), ("{}_x", "{}_y")])
def test_halves_in_one_file(tmp_path: Path, names: tuple[str, str]) -> None:
    """MedMNIST's, with labels (N, 1), and Keras's."""
    images, labels = names
    rows = {"train": slice(0, 6), "val": slice(0, 2), "test": slice(2, 4)}
    arrays = {images.format(half): COLOUR[row] for half, row in rows.items()}
    arrays |= {labels.format(half): LABELS[row, None] for half, row in rows.items()}
    for half, row in rows.items():
        data = load(tmp_path / "x.npz", arrays, split=half)
        assert np.array_equal(data.images.numpy(), NCHW[row])
        assert data.labels is not None
        assert data.labels.tolist() == LABELS[row].tolist()  # of the test half {2, 0}, not numbered anew
    del arrays[images.format("val")]
    with pytest.raises(DataError, match="has no val images"):
        load(tmp_path / "x.npz", arrays, split="val")


def test_npy(tmp_path: Path) -> None:
    for array in (COLOUR, np.asfortranarray(COLOUR), NCHW):
        np.save(tmp_path / "x.npy", array)
        assert np.array_equal(load_images(tmp_path / "x.npy").images.numpy(), NCHW)


def test_ambiguous_layout(tmp_path: Path) -> None:
    cube = RNG.integers(0, 256, (4, 8, 8, 8), dtype=np.uint8)
    with pytest.raises(DataError, match="give layout"):
        load(tmp_path / "x.npz", {"images": cube})
    for layout, wanted in (("NCHW", cube), ("NHWC", cube.transpose(0, 3, 1, 2))):
        assert np.array_equal(load(tmp_path / "x.npz", layout=layout).images.numpy(), wanted)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sides", [(8, 5), (2, 9), (4, 7)])
def test_rectangles(tmp_path: Path, channels: int, sides: tuple[int, int]) -> None:
    """One reading of the shape gives 1 or 3 channels, the other neither that nor square images."""
    wanted = RNG.integers(0, 256, (6, channels, *sides), dtype=np.uint8)
    for array in (wanted, wanted.transpose(0, 2, 3, 1), np.asfortranarray(wanted)):
        assert np.array_equal(load(tmp_path / "x.npz", {"images": array}, size=sides).images, wanted)
    if channels == 1:
        assert np.array_equal(load(tmp_path / "x.npz", {"images": wanted[:, 0]}).images, wanted)
    for layout, array in (("NCHW", wanted), ("NHWC", wanted.transpose(0, 2, 3, 1))):
        assert np.array_equal(load(tmp_path / "x.npz", {"images": array}, layout=layout).images, wanted)
    for size in (sides[::-1], sides[0], (sides[0], sides[1] + 1)):
        with pytest.raises(DataError, match=r"its images are \d pixels (wide|high), not \d"):
            load(tmp_path / "x.npz", layout="NHWC", size=size)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((6, 3, 5, 3), "may be"),
        ((6, 3, 8, 1), "may be"),
        ((6, 3, 3, 8), "may be"),
        ((6, 1, 1, 4), "may be"),
        ((6, 4, 8, 5), "neither 1 or 3 channels nor square images"),
    ],
)
def test_shapes_that_do_not_tell(tmp_path: Path, shape: tuple[int, ...], said: str) -> None:
    array = RNG.integers(0, 256, shape, dtype=np.uint8)
    with pytest.raises(DataError, match=rf"{said}.* \(N, H, W, ch\) or \(N, ch, H, W\): give layout"):
        load(tmp_path / "x.npz", {"images": array})
    assert np.array_equal(load(tmp_path / "x.npz", layout="NCHW").images, array)
    assert np.array_equal(load(tmp_path / "x.npz", layout="NHWC").images, array.transpose(0, 3, 1, 2))


@given(sides=st.tuples(st.integers(1, 9), st.integers(1, 9)), channels=st.integers(1, 9), last=st.booleans())
def test_no_shape_is_read_in_the_wrong_way(sides: tuple[int, int], channels: int, last: bool) -> None:
    """Pictures, grey or in colour, and square images of any channels are read as they are, or refused."""
    if channels not in (1, 3) and sides[0] != sides[1]:
        return
    shape = (2, *sides, channels) if last else (2, channels, *sides)
    try:
        axis = channel_axis("x", np.dtype(np.uint8), shape, "auto")
    except DataError:
        return
    assert (axis == 3) == last or shape[1:] == (1, 1, 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ">f4"])
def test_sequences_are_kept(tmp_path: Path, dtype: Any, remarks: Remarks) -> None:
    sequences = (100 * RNG.normal(size=(6, 7, 5))).astype(dtype)
    data = load(tmp_path / "x.npz", {"images": sequences, "labels": LABELS}, layout="tokens")
    assert data.sequences
    assert data.images.dtype == torch.float32
    assert np.array_equal(data.images, sequences.astype(np.float32))
    assert data.labels is not None
    assert re.search(r"sequences from -\S+ to \S+ are kept as they are", remarks.messages[-1])
    np.save(tmp_path / "x.npy", np.asfortranarray(sequences))
    alone = load_images(tmp_path / "x.npy", layout="tokens", values="raw")
    assert torch.equal(alone.images, data.images)
    assert alone.spread(3).images.shape == (3, 7, 5)
    with pytest.raises(ArgumentError, match="size: expected None, as sequences have no pixels"):
        load_images(tmp_path / "x.npy", layout="tokens", size=7)


def test_three_dimensions_are_grey_images_unless_told(tmp_path: Path) -> None:
    grey = RNG.random((6, 7, 5))
    assert load(tmp_path / "x.npz", {"images": grey}).images.shape == (6, 1, 7, 5)
    with pytest.raises(DataError, match=r"layout='tokens': the same for sequences \(N, T, D\)"):
        load(tmp_path / "x.npz", {"images": 100 * grey - 50})


@pytest.mark.parametrize(
    ("images", "how", "message"),
    [
        (COLOUR / 255, {}, r"expected sequences \(N, T, D\), got float64 \(6, 8, 8, 3\)"),
        (RNG.normal(size=(6, 5)), {}, r"expected sequences \(N, T, D\)"),
        (GREY, {}, "expected sequences of floats, got uint8"),
        (GREY.astype(np.int64), {}, "expected sequences of floats, got int64"),
        (GREY / 255, {"values": "0..1"}, "expected values 'raw', as sequences are kept as they are, got '0..1'"),
        (GREY * np.nan, {}, "expected finite sequences"),
        (np.zeros((6, 0, 5), np.float32), {}, "got none"),
    ],
)
def test_what_are_no_sequences(tmp_path: Path, images: np.ndarray, how: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(tmp_path / "x.npz", {"images": images}, layout="tokens", **how)


def test_what_sample_writes_of_sequences(tmp_path: Path) -> None:
    """It has three dimensions, as no pictures of `tarflow-fast sample` have."""
    sequences = RNG.normal(size=(6, 7, 5)).astype(np.float32)
    data = load(tmp_path / "x.npz", {"images": sequences, "seed": 0, "first": 0})
    assert np.array_equal(data.images, sequences)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (COLOUR / 255, "0..1"),
        ((COLOUR / 255).astype(np.float32), "0..1"),
        (COLOUR / 127.5 - 1, "-1..1"),
        (COLOUR.astype(np.float64), "0..255"),
        (COLOUR.astype(np.int64), "0..255"),
        (COLOUR.astype(">f4"), "0..255"),
    ],
)
def test_ranges_of_pictures(tmp_path: Path, images: np.ndarray, said: str, remarks: Remarks) -> None:
    data = load(tmp_path / "x.npz", {"images": images})
    assert np.array_equal(data.images.numpy(), NCHW)
    assert remarks.messages[-1].endswith(f"are taken as {said}")


@pytest.mark.parametrize(
    "images",
    [
        COLOUR - 128.0,
        COLOUR / 100,
        COLOUR * 0.0,
        COLOUR * 2.0,
        COLOUR.astype(np.uint16) * 257,
        COLOUR.astype(np.int16) - 1,
        COLOUR * np.nan,
        COLOUR + np.where(COLOUR == 0, np.inf, 0),
        COLOUR * 1j,
        RNG.normal(size=(6, 8, 8, 3)),
    ],
)
def test_ranges_that_do_not_tell(tmp_path: Path, images: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"x\.npz': .*(values|numbers|finite)"):
        load(tmp_path / "x.npz", {"images": images})


def test_given_values(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    dark = COLOUR // 100
    assert np.array_equal(load(path, {"images": dark * 1.0}, values="0..255").images, dark.transpose(0, 3, 1, 2))
    raw = load(path, {"images": COLOUR - 128.0}, values="raw")
    assert raw.images.dtype == torch.float32
    assert np.array_equal(raw.images, NCHW - 128.0)
    with pytest.raises(DataError, match=r"expected values '0\.\.1'"):
        load(path, {"images": COLOUR * 1.0}, values="0..1")
    with pytest.raises(DataError, match="got uint8"):
        load(path, {"images": COLOUR}, values="raw")


def test_latents_are_kept(tmp_path: Path) -> None:
    latents = RNG.normal(size=(6, 4, 8, 8)).astype(np.float32)
    assert np.array_equal(load(tmp_path / "x.npz", {"images": latents}).images, latents)
    assert load(tmp_path / "x.npz", {"images": COLOUR[..., [0, 1, 2, 0]]}).images.shape == (6, 4, 8, 8)


def test_what_sample_writes(tmp_path: Path) -> None:
    """float32 NCHW, about -1 to 1, with seed and first beside it."""
    images = (NCHW / 127.5 - 1).astype(np.float32)
    images[0, 0, 0, :2] = (-1.4, 1.2)
    wanted = NCHW.copy()
    wanted[0, 0, 0, :2] = (0, 255)
    arrays = {"images": images, "seed": 0, "first": 0, "labels": LABELS, "log_prob": np.zeros(6)}
    data = load(tmp_path / "x.npz", arrays)
    assert np.array_equal(data.images, wanted)
    assert data.labels is not None


@pytest.mark.parametrize(("channels", "name"), [(4, "RGBA"), (2, "LA")])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_what_may_be_alpha_is_said_once(
    tmp_path: Path, remarks: Remarks, channels: int, name: str, dtype: type
) -> None:
    images = np.repeat(COLOUR[..., :1], channels, -1).astype(dtype)
    assert load(tmp_path / "x.npz", {"images": images}).images.shape == (6, channels, 8, 8)
    assert "\n".join(remarks.messages).count(f"if they are {name}, put them on a background first") == 1
    said = len(remarks.messages)
    load(tmp_path / "x.npz", {"images": images}, values="0..255")
    load(tmp_path / "x.npz", {"images": COLOUR})
    assert f"are {name}" not in "\n".join(remarks.messages[said:])


def test_labels_with_gaps_are_numbered_anew_for_training(tmp_path: Path, remarks: Remarks) -> None:
    arrays = {"images": COLOUR, "labels": np.array([7, 1, 2, 7, 1, 2])}
    data = load(tmp_path / "x.npz", arrays)
    assert data.labels is not None
    assert data.labels.tolist() == [2, 0, 1, 2, 0, 1]
    assert (data.num_classes, data.numbers, data.names) == (3, (1, 2, 7), ("1", "2", "7"))
    assert "the labels 1, 2, 7 become classes 0 to 2" in "\n".join(remarks.messages)
    held_out = load(tmp_path / "x.npz", arrays, split="test").labels
    assert held_out is not None
    assert held_out.tolist() == [7, 1, 2, 7, 1, 2]


@given(numbers=st.lists(st.integers(0, 300), min_size=1, max_size=20))
def test_numbering_anew_keeps_classes_apart(numbers: list[int]) -> None:
    found = read_labels("x", np.array(numbers), len(numbers), None, "train")
    table = found.numbers or tuple(range(max(numbers) + 1))
    assert [table[label] for label in found.labels] == numbers
    assert set(found.labels.tolist()) == set(range(len(set(numbers))))


def test_one_hot_counts_classes_that_have_no_image(tmp_path: Path) -> None:
    assert load(tmp_path / "x.npz", {"images": COLOUR, "labels": np.eye(5)[LABELS]}).num_classes == 5
    for rows in (np.ones((6, 4)), np.eye(4)[LABELS] * 0.5, np.zeros((6, 4), int)):
        with pytest.raises(DataError, match="a single class for each image"):
            load(tmp_path / "x.npz", {"images": COLOUR, "labels": rows})


def test_labels_that_are_names(tmp_path: Path) -> None:
    words = np.array(["dog", "cat", "owl"])[LABELS]
    data = load(tmp_path / "x.npz", {"images": COLOUR, "labels": words})
    assert data.class_names == ("cat", "dog", "owl")
    assert data.labels is not None
    assert data.labels.tolist() == [1, 0, 2, 1, 0, 2]
    names = np.array(["owl", "dog", "cat"])
    data = load(tmp_path / "x.npz", {"images": COLOUR, "labels": words, "class_names": names})
    assert data.labels is not None
    assert data.labels.tolist() == [1, 2, 0, 1, 2, 0]
    with pytest.raises(DataError, match="got 'owl'"):
        load(tmp_path / "x.npz", {"images": COLOUR, "labels": words, "class_names": names[1:]})


@pytest.mark.parametrize("shape", ["(99999999999, 64, 64, 3)", "(-5, 64, 64, 3)", "(2, 8, 8, 3)", "(6, 8, 8, 4)"])
def test_headers_that_lie(tmp_path: Path, shape: str) -> None:
    """Before memory is taken."""
    head = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + COLOUR.tobytes()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", content)
    (tmp_path / "x.npy").write_bytes(content)
    (tmp_path / "x.npz").write_bytes(file.getvalue())
    for name in ("x.npy", "x.npz"):
        with pytest.raises(DataError, match=rf"{name}': not a whole"):
            load_images(tmp_path / name)


@given(place=st.integers(0, 130), value=st.integers(0, 255), kept=st.integers(0, 2000))
def test_damaged_headers(tmp_path_factory: pytest.TempPathFactory, place: int, value: int, kept: int) -> None:
    path = tmp_path_factory.mktemp("damaged") / "x.npy"
    np.save(path, COLOUR)
    content = bytearray(path.read_bytes())
    content[place] = value
    path.write_bytes(content[: -kept or None])
    with contextlib.suppress(DataError):
        load_images(path)


def test_large_arrays_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tarflow_fast.data.members.PIECE", 400)
    for array in (COLOUR, NCHW, GREY, COLOUR / 255):
        data = load(tmp_path / "x.npz", {"images": array})
        assert np.array_equal(data.images, GREY[:, None] if array is GREY else NCHW)


@pytest.mark.parametrize(("argument", "value"), [("layout", "HWC"), ("values", "0-1"), ("split", "dev")])
def test_bad_arguments(tmp_path: Path, argument: str, value: str) -> None:
    with pytest.raises(ArgumentError, match=argument):
        load_images(tmp_path, **{argument: value})  # type: ignore[arg-type]
