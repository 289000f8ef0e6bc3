"""All processes of a machine share their data: one reads it, the others map the file in which it is."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..data import ImageData
from ..data.load import load_into
from ..data.store import Store, mapped_array
from ..errors import DataError
from ..files import PathLike
from .processes import Processes

BEAT = 1.0  # seconds between signs of life while one reads, so that no process is taken for dead


@dataclass(frozen=True)
class _Shared:
    """A `_Shared` tells another process in which file the images are, and all else of an ImageData."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    labels: Tensor | None
    class_names: tuple[str, ...] | None
    numbers: tuple[int, ...] | None

    @classmethod
    def of(cls, data: ImageData, path: Path) -> _Shared:
        images = data.images.numpy()
        return cls(path, images.shape, images.dtype.str, data.labels, data.class_names, data.numbers)

    def open(self) -> ImageData:
        images = torch.from_numpy(mapped_array(self.path, self.shape, self.dtype))
        return ImageData(images, self.labels, self.class_names, self.numbers)


def load_once(group: Processes, path: PathLike, *, cache: PathLike | None, **how: Any) -> ImageData:
    """Returns what `load_images` does, read by one process of each machine.

    The others map the same file, which has no name any more when this returns. Where the environment does not tell
    which processes share a machine (LOCAL_RANK and GROUP_RANK, as torchrun sets them), each reads for itself.
    """
    if group.world == 1:
        return load_into(Store(cache), path, **how)
    known = "LOCAL_RANK" in os.environ and "GROUP_RANK" in os.environ
    machine = os.environ["GROUP_RANK"] if known else str(group.rank)
    reads = not known or os.environ["LOCAL_RANK"] == "0"
    store = Store(cache, mapped=True)
    found: ImageData | Exception | None = None
    with ThreadPoolExecutor(1) as pool:
        task = pool.submit(load_into, store, path, **how) if reads else None
        try:
            while group.any(task is not None and not task.done()):
                if task is not None:
                    wait([task], BEAT)
        except BaseException:
            store.stop.set()
            raise
        if task is not None:
            found = task.exception() or task.result()  # type: ignore[assignment]
    mine: _Shared | str | None = None
    if isinstance(found, ImageData):
        assert store.path is not None
        mine = _Shared.of(found, store.path)
    elif found is not None:
        mine = str(found)
    everywhere: list[Any] = [None] * group.world
    dist.all_gather_object(everywhere, (machine, mine))
    try:
        if isinstance(found, Exception):
            raise found
        for where, shared in everywhere:
            if isinstance(shared, str):
                raise DataError(shared)
            if found is None and where == machine and shared is not None:
                found = shared.open()
        group.wait()
    finally:
        store.close()
    assert isinstance(found, ImageData)
    return found
