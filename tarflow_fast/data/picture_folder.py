"""The pictures of a folder are read when they are wanted, and not all held."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..files import PathLike
from ..read_ahead import own_cores, read_ahead
from ..sizes import Size, pair
from .folders import Pictures, find_pictures
from .idx import find_idx
from .load import DECODED_BYTES
from .pictures import Room, read_picture_into, read_pictures, reading_pictures
from .png import in_a_task


class PictureFolder:
    """A `PictureFolder` reads pictures as `load_images` does. found: the pictures."""

    def __init__(self, found: Pictures):
        self.paths, self.notes = found.paths, found.notes

    def read(self, numbers: range, size: Size, channels: int = 3) -> Iterator[NDArray[np.uint8]]:
        """Yields pictures (channels, H, W), while those after them are read by as many threads as there are cores.

        Args:
            numbers: Those that are read.
            size: (H, W), or one number for both.
            channels: 3, or 1 for grey ones.

        Raises:
            DataError: A picture cannot be read.
        """
        shape = (channels, *pair(size))
        read = functools.partial(read_picture_into, room=Room(own_cores() * DECODED_BYTES))

        def some(part: range) -> Iterator[NDArray[np.uint8]]:
            out = np.empty((len(part), *shape), np.uint8)
            return read_pictures(self.paths[part.start : part.stop], out, read)

        with reading_pictures():
            yield from read_ahead(some, numbers, in_a_task(math.prod(shape)))


def open_pictures(path: PathLike, split: str = "train") -> PictureFolder | None:
    """Returns the pictures that `load_images` would read from a folder, or None where it would read something else.

    Raises:
        DataError: There is nothing of that name, or it cannot be told which pictures are meant.
    """
    folder = Path(path)
    if not folder.exists():
        raise DataError(f"{os.fspath(folder)!r}: no such file or folder")
    if not folder.is_dir() or find_idx(folder, split) is not None:
        return None
    return PictureFolder(find_pictures(folder, split))
