"""`load_images` reads whatever holds images as ImageData."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..checks import check_choice
from ..errors import ArgumentError, DataError, TarFlowWarning
from ..files import PathLike
from ..limits import MOST_SIZE
from ..read_ahead import own_cores, read_ahead
from ..scalars import check_flag, plain
from ..sizes import Size, checked_size, pair
from .arrays import image_data, load_npy, load_npz
from .folders import find_pictures
from .idx import find_idx, labels_beside, read_idx
from .image_data import ImageData
from .labels import read_labels
from .pictures import Room, read_picture_into, read_pictures, reading_pictures
from .png import in_a_task
from .store import Store
from .values import LAYOUTS, PICTURE_CHANNELS, VALUES

SPLITS = ("train", "val", "test")
DECODED_SHARE = 0.15  # decoded pictures take at most this share of the memory of the pixels asked for
DECODED_BYTES, USUAL_SIZE = 64 * 2**20, 1024  # or so many bytes a thread, for pictures made no larger


def load_images(
    path: PathLike,
    *,
    split: str = "train",
    size: Size | None = None,
    channels: int = 3,
    layout: str = "auto",
    values: str = "auto",
    cache: PathLike | None = None,
    progress: bool = False,
) -> ImageData:
    """Reads images from a folder of pictures, a `.npz` or `.npy` file, or IDX files.

    `path` is one of

    - a folder with one sub-folder of pictures a class (class names: the sorted names of the sub-folders; pictures in
      folders further down are of that class), or with pictures alone (no labels), or with folders `train` and `val`
      (`valid`, `validation`) or `test` that hold such. Whatever is hidden, of the system or no picture is skipped.
      Pictures are made 8-bit, upright and opaque (see `data/pictures.py`), resized until they just cover `size`
      (bicubic), cropped to the centre, and made RGB, or grey for channels = 1;
    - a `.npz` file: images (N, H, W), (N, H, W, ch) or (N, ch, H, W), or sequences (N, T, D), under the name images,
      arr_0, x or data, or of a half x_train, train_images, … (val, test); labels, if any, (N,) or (N, 1) integers,
      one-hot rows or names, under labels, arr_1, y, y_train, train_labels, …; and class_names. Or a `.npy` file: images
      or sequences alone;
    - an IDX file of images (`…-images-idx3-ubyte`, perhaps `.gz`), with the labels file of the same name beside it if
      there is one; or a folder of MNIST's four files, as MNIST's own, torchvision's or Kaggle's.

    Args:
        path: A folder or file as above.
        split: "train", "val" or "test", the half to take of data that has halves; data without halves is taken whole,
            and "val" serves as "test" where there is no other. In data to train on ("train") integer labels that leave
            out some below the highest are numbered anew.
        size: The pixels along a side, or (height, width), required for pictures; images of the other formats must have
            it already, sequences have none.
        channels: 1 or 3, the number of channels that pictures get; the other formats have their own.
        layout: "NHWC" or "NCHW" where a shape of four dimensions does not tell: "auto" takes a reading if it gives
            images of 1 or 3 channels or square ones, and the other does not. "tokens" is for sequences (N, T, D) of
            floats, which stay as they are, in float32; "auto" sees those that `tarflow-fast sample` wrote. Any
            other array of three dimensions is one of grey images.
        values: The meaning of floats: "0..1", "-1..1", "0..255", or "raw" for data that are no pictures, which stay
            float32; "auto" sees it by their range, and by a number of channels other than 1 and 3 ("raw").
        cache: The folder for images that take more than half of the memory that is free, by default the system's
            temporary folder; they are mapped from a file, which goes with this process.
        progress: Whether to show a bar while pictures are read.

    Returns:
        The images, with labels and class names where they have any.

    Raises:
        ArgumentError: An argument has the wrong type or range, or does not go with the data.
        DataError: A file is missing, truncated, foreign or at odds with another, or there is no room for the images.

    Warns:
        TarFlowWarning: Something was decided that may not be meant, as which files were skipped.
    """
    check_choice("split", split, SPLITS)
    check_choice("layout", layout, LAYOUTS)
    check_choice("values", values, VALUES)
    if size is not None:
        size = checked_size("size", size, MOST_SIZE)
    channels = plain(channels)
    if not isinstance(channels, int) or channels not in PICTURE_CHANNELS:
        raise ArgumentError("channels", "1 or 3", repr(channels))
    progress = check_flag("progress", progress)
    for name, given in (("path", path), ("cache", "" if cache is None else cache)):
        if not isinstance(given, (str, os.PathLike)) or isinstance(os.fspath(given), bytes):
            raise ArgumentError(name, "a path", type(given).__name__)
    return load_into(Store(cache), path, split, size, channels, layout, values, progress)


def load_into(
    store: Store,
    path: PathLike,
    split: str,
    size: Size | None,
    channels: int,
    layout: str = "auto",
    values: str = "auto",
    progress: bool = False,
) -> ImageData:
    """Returns what `load_images` does, with the images in an array of `store`."""
    path = Path(path)
    where = repr(os.fspath(path))
    notes: list[str] = []
    if not path.exists():
        raise DataError(f"{where}: no such file or folder")
    idx = find_idx(path, split) if path.is_dir() else None
    if path.is_dir() and idx is None:
        if layout == "tokens":
            raise ArgumentError("layout", "'auto', as pictures are no sequences", repr(layout))
        if size is None:
            raise ArgumentError("size", "pixels along a side, to which pictures are brought", None)
        data, notes = _load_folder(path, split, size, channels, store, progress)
    elif path.suffix.lower() == ".npz":
        data, notes = load_npz(path, split, layout, values, store)
    elif path.suffix.lower() == ".npy":
        data, notes = load_npy(path, layout, values, store)
    elif layout == "tokens":
        raise ArgumentError("layout", "'auto', as IDX files hold images, no sequences", repr(layout))
    else:
        data, notes = _load_idx(idx or path, split, store)
    if size is not None:
        _check_size(where, data, size)
    for note in [*store.notes, *notes]:
        warnings.warn(note, TarFlowWarning, stacklevel=3)
    return data


def _check_size(where: str, data: ImageData, size: Size) -> None:
    """Raises ArgumentError for sequences, DataError for images of another size."""
    if data.sequences:
        raise ArgumentError("size", "None, as sequences have no pixels", size)
    for there, wanted, kind in zip(data.images.shape[:1:-1], pair(size)[::-1], ("wide", "high"), strict=True):
        if there != wanted:
            raise DataError(f"{where}: its images are {there} pixels {kind}, not {wanted}")


def _load_idx(path: Path, split: str, store: Store) -> tuple[ImageData, list[str]]:
    images, where = read_idx(path, 3, store), repr(str(path))
    beside = labels_beside(path)
    if 0 in images.shape:
        raise DataError(f"{where}: expected images, got none: {images.shape}")
    labels = None if beside is None else read_labels(where, read_idx(beside, 1, Store()), len(images), None, split)
    notes = [labels.note] if labels is not None and labels.note is not None else []
    return image_data(where, images[:, None], labels), notes


def _load_folder(
    path: Path, split: str, size: Size, channels: int, store: Store, progress: bool
) -> tuple[ImageData, list[str]]:
    found = find_pictures(path, split)
    out = store.empty((len(found.paths), channels, *pair(size)), np.uint8)
    read_folder(found.paths, out, progress, store.stop)
    labels = None if found.labels is None else torch.tensor(found.labels)
    return ImageData(torch.from_numpy(out), labels, found.class_names), found.notes


def read_folder(paths: list[str], out: np.ndarray, progress: bool = False, stop: threading.Event | None = None) -> None:
    """Reads picture i into out[i].

    There are as many threads as cores, as decoding frees Python's lock; they decode no more pictures at once than there
    is room for. paths: the N pictures. out: (N, channels, H, W) uint8. stop: an event that ends reading early. Raises
    DataError for the first picture that cannot be read.
    """
    usual = min(own_cores(), len(paths)) * DECODED_BYTES if max(out.shape[2:]) <= USUAL_SIZE else 0
    read = functools.partial(read_picture_into, room=Room(max(int(DECODED_SHARE * out.nbytes), usual)))

    def some(part: range) -> Iterator[np.ndarray]:
        return read_pictures(paths[part.start : part.stop], out[part.start : part.stop], read)

    pictures = read_ahead(some, range(len(paths)), in_a_task(out[0].nbytes))
    bar = tqdm(total=len(paths), desc="reading", unit="picture", disable=not progress, leave=False, dynamic_ncols=True)
    with reading_pictures(), contextlib.closing(pictures), bar:
        for _ in pictures:
            bar.update()
            if stop is not None and stop.is_set():
                return
