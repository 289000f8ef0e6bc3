"""A `Store` puts pixels in memory, or in a file that is mapped into it."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

from ..devices import free_memory
from ..errors import ArgumentError, DataError
from ..files import PathLike, _create, remove_unfinished

SHARE = 0.5  # images that take more of the memory that is free go into a file


class Store:
    """A `Store` makes arrays in memory, or, where they are more than half of what is free, in a file of a folder.

    folder: that folder, by default the system's temporary one. mapped: whether arrays go into files whatever their
    size. notes: sentences on where arrays were put. stop: an event that is set where arrays are not wanted any more.

    The files have no name, or lose theirs when the store is closed, so that nothing stays behind; those of a killed
    process go with the next store in the folder.
    """

    def __init__(self, folder: PathLike | None = None, *, mapped: bool = False):
        self.folder = Path(tempfile.gettempdir() if folder is None else folder)
        if not self.folder.is_dir():
            raise ArgumentError("cache", "an existing folder", repr(os.fspath(self.folder)))
        self.mapped = mapped
        self.notes: list[str] = []
        self.stop = threading.Event()
        self._files: list[tuple[int, Path]] = []

    @property
    def path(self) -> Path | None:
        """The file of the array that was made last, or None where none has a name."""
        return self._files[-1][1] if self._files else None

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        """Returns a new array. Raises DataError where there is no room."""
        size = int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
        if not self.mapped and size <= SHARE * free_memory(torch.device("cpu")):
            return np.empty(shape, dtype)
        if not self.mapped:
            note = (
                f"{size / 2**30:.1f} GiB of images are more than half of the memory that is free: they are put into a "
            )
            self.notes.append(note + f"file in {os.fspath(self.folder)!r}")
        remove_unfinished(self.folder)
        try:
            descriptor, path = _create(self.folder / "images.pixels")
            self._files.append((descriptor, path))
            _reserve(descriptor, size, self.folder)
        except OSError as error:
            self.close()
            where = repr(os.fspath(self.folder))
            raise DataError(
                f"{where}: no room for {size / 2**30:.1f} GiB of images ({error.strerror}); give another "
                "folder by cache"
            ) from error
        array: NDArray[Any] = np.memmap(path, dtype, "r+", shape=tuple(shape))
        if not self.mapped:
            self.close()
        return array

    def close(self) -> None:
        """Takes the files' names away, while arrays stay. Windows keeps a file in use, which the next store removes."""
        for descriptor, path in self._files:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                path.unlink()
        self._files.clear()


def _reserve(descriptor: int, size: int, folder: Path) -> None:
    """Makes a file so long, and raises OSError now rather than fail at the first write to a page without room."""
    if sys.platform == "linux":
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    if size > shutil.disk_usage(folder).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.ftruncate(descriptor, size)


def mapped_array(path: Path, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
    """Returns the array that another process has put into this file."""
    array: NDArray[Any] = np.memmap(path, dtype, "r+", shape=tuple(shape))
    return array
