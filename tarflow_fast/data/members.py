"""Arrays of `.npz` and `.npy` files are read piece by piece: a header that lies is found before it takes memory."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

PIECE = 1 << 22  # bytes
MOST_PACKED = 1032  # one byte of a deflate stream gives no more bytes
LARGEST_TABLE = 1 << 32  # labels or names take no more bytes


class BrokenArray(ValueError):
    """A `BrokenArray` is raised for what is not a whole array of plain numbers or text."""


@dataclass(frozen=True)
class Member:
    """A `Member` is one array of a file, not yet read.

    open: opens its bytes from the start. size: the number of these bytes. packed: the number of bytes that they take in
    the file.
    """

    open: Callable[[], IO[bytes]]
    size: int
    packed: int

    def header(self) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Returns (shape, dtype). Raises BrokenArray for a header that cannot be true."""
        with self.open() as stream:
            shape, _, dtype = self._header(stream)
        return shape, dtype

    def _header(self, stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
        """Returns (shape, whether in Fortran's order, dtype), and leaves the stream at the data."""
        version = npy.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise BrokenArray(f"version {version} of the format")
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        if dtype.hasobject or dtype.names is not None:
            raise BrokenArray(f"an array of {dtype}, where plain arrays are expected")
        length = 10 if version == (1, 0) else 12
        size = math.prod(shape) * dtype.itemsize
        if not 0 <= size <= self.size - length or self.size > MOST_PACKED * self.packed + PIECE:
            raise BrokenArray(f"its header says {shape} of {dtype}; it holds {self.size} bytes")
        return shape, fortran, dtype

    def pieces(self) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yields (number of the first row, rows) from the first row to the last; all at once for Fortran's order."""
        with self.open() as stream:
            shape, fortran, dtype = self._header(stream)
            row = math.prod(shape[1:]) * dtype.itemsize
            count = shape[0] if shape else 1
            step = count if fortran or not row else max(1, PIECE // row)
            for first in range(0, count, max(1, step)):
                rows = min(step, count - first)
                flat = np.frombuffer(_exactly(stream, rows * row), dtype)
                if fortran:
                    yield first, flat.reshape(shape[::-1]).transpose()
                else:
                    yield first, flat.reshape((rows, *shape[1:]) if shape else ())
            if stream.read(1):
                raise BrokenArray("it goes on after its array")

    def whole(self) -> NDArray[Any]:
        """Returns the array in memory. Raises BrokenArray for one that is too large to be labels or names."""
        if self.size > LARGEST_TABLE:
            raise BrokenArray(f"{self.size} bytes, where labels or names are expected")
        pieces = [piece for _, piece in self.pieces()]
        if not pieces:
            shape, dtype = self.header()
            return np.empty(shape, dtype)
        return np.concatenate(pieces) if pieces[0].ndim else pieces[0]


def _exactly(stream: IO[bytes], size: int) -> bytearray:
    out = bytearray(size)
    view, filled = memoryview(out), 0
    while filled < size:
        part = stream.read(min(size - filled, PIECE))
        if not part:
            raise BrokenArray("it ends too early")
        view[filled : filled + len(part)] = part
        filled += len(part)
    return out


def npy_member(path: Path) -> Member:
    """Returns the array of a `.npy` file."""
    size = os.stat(path).st_size
    return Member(lambda: open(path, "rb"), size, size)


def npz_members(path: Path, archive: zipfile.ZipFile) -> dict[str, Member]:
    """Returns the arrays of an open `.npz` file by name."""

    def member(info: zipfile.ZipInfo) -> Member:
        packed = (
            info.compress_size if info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) else info.file_size
        )
        return Member(lambda: archive.open(info), info.file_size, packed)

    return {info.filename.removesuffix(".npy"): member(info) for info in archive.infolist()}
