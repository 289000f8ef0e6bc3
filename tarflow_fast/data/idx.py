"""IDX files, as MNIST's, have bytes 0, 0, 8, dims, then big-endian uint32 sizes, then unsigned bytes."""

from __future__ import annotations

import gzip
import math
import re
import zlib
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, printable
from .store import Store

PREFIX = {"train": "train", "val": "val", "test": "t10k"}
UINT8 = 8  # the type byte of the header
BROKEN_GZIP = (EOFError, zlib.error, gzip.BadGzipFile)
MOST_PACKED = 1032  # one byte of a deflate stream gives no more bytes
BLOCK = 1 << 22


def find_idx(folder: Path, split: str) -> Path | None:
    """Returns the images file of that half in a folder as MNIST's, torchvision's (`raw/`, `MNIST/raw/`) or Kaggle's.

    Returns None where the folder has no IDX files at all. Raises DataError where only another half is there, or more
    than one data set.
    """
    sets = [p.parent for p in sorted(folder.glob("*/raw")) if _any(p)]
    places = [p for p in (folder, folder / "raw", *(s / "raw" for s in sets)) if _any(p)]
    if not places:
        return None
    if len(places) > 1:
        raise DataError(f"{str(folder)!r}: has several data sets: {', '.join(repr(str(p)) for p in places)}")
    found = _images_in(places[0], split)
    if found is None:
        raise DataError(f"{str(places[0])!r}: has no {PREFIX[split]}-images-idx3-ubyte[.gz], its {split} images")
    return found


def _any(folder: Path) -> bool:
    return any(_images_in(folder, split) for split in PREFIX)


def _images_in(folder: Path, split: str) -> Path | None:
    for name in (f"{PREFIX[split]}-images-idx3-ubyte", f"{PREFIX[split]}-images.idx3-ubyte"):
        found = _packed_or_not(folder, name)
        if found is not None:
            return found
    return None


def _packed_or_not(folder: Path, name: str) -> Path | None:
    """Returns the file of that name, packed or not, or in a folder of its own name, as Kaggle's archives unpack."""
    places = (folder / name, folder / f"{name}.gz", folder / name / name)
    return next((p for p in places if p.is_file()), None)


def labels_beside(path: Path) -> Path | None:
    """Returns the labels file that goes with an images file, or None."""
    name = path.name.removesuffix(".gz")
    matched = re.fullmatch(r"(.*)images([-.])idx3(.*)", name)
    if matched is None:
        return None
    wanted = f"{matched[1]}labels{matched[2]}idx1{matched[3]}"
    return _packed_or_not(path.parent.parent if path.parent.name == path.name else path.parent, wanted)


def read_idx(path: Path, dims: int, store: Store) -> NDArray[np.uint8]:
    """Returns the array of a file. Raises DataError for anything but one of `dims` dimensions."""
    packed = path.suffix == ".gz"
    try:
        with cast(BinaryIO, gzip.open(path)) if packed else path.open("rb") as file:
            return _read(file, path, dims, packed, store)
    except BROKEN_GZIP as error:
        raise DataError(f"{str(path)!r}: a damaged or truncated gzip file ({printable(error)})") from error


def _read(file: BinaryIO, path: Path, dims: int, packed: bool, store: Store) -> NDArray[np.uint8]:
    head = file.read(4 + 4 * dims)
    if len(head) < 4 + 4 * dims or head[:2] != b"\0\0":
        raise DataError(f"{str(path)!r}: not an IDX file")
    if head[2] != UINT8 or head[3] != dims:
        wanted = f"unsigned bytes (type {UINT8}) in {dims} dimensions"
        raise DataError(f"{str(path)!r}: expected {wanted}, got type {head[2]} in {head[3]} dimensions")
    shape = tuple(int.from_bytes(head[i : i + 4], "big") for i in range(4, len(head), 4))
    size, there = math.prod(shape), path.stat().st_size
    lie = f"{str(path)!r}: its header says {shape}, {size} bytes; it holds"
    if packed and size > MOST_PACKED * there:
        raise DataError(f"{lie} at most {MOST_PACKED * there}")
    if not packed and size != there - len(head):
        raise DataError(f"{lie} {there - len(head)}")
    array: NDArray[Any] = store.empty((size,), np.uint8) if size else np.empty((0,), np.uint8)
    view, filled = memoryview(array.data), 0
    while filled < size and (n := file.readinto(view[filled : filled + BLOCK])):  # type: ignore[attr-defined]
        filled += n
    if filled < size or file.read(1):
        raise DataError(f"{lie} {filled if filled < size else 'more'}")
    return array.reshape(shape)
