"""The features of a model's images are written in shards, in the place of the images.

A run that writes them is one of `sampling/sharded`: any number of processes divide it, and it goes on however it was
stopped. What is measured of the shards does not depend on who drew them, as they are read in the order of the images.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..files import PathLike, replacing
from ..images import to_uint8
from ..sampling.report import Samples
from ..sampling.sharded import Format, shard_files
from ..sampling.sharded.formats import SWEEP, Add, Shard
from ..sampling.sharded.job import MANIFEST
from .features import Features

NAME = "features"
KINDS = ("pooled", "spatial", "logits")
IN_A_PASS = 64  # images, of 299×299 in Inception-v3, whatever the batch that they are drawn in


class Extractor(Protocol):
    """An `Extractor` makes features of images, as `Inception` does. name: what these depend on."""

    @property
    def name(self) -> str: ...

    def features(self, images: Tensor) -> Features: ...


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Lets torch compute on one thread of the CPU, as the sums of its convolutions depend on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def feature_format(extractor: Extractor) -> Format:
    """Returns the format of shards that hold features, for `draw_shards`.

    A shard is a `.npz` file with `pooled`, `spatial` and `logits`, each (k, d) fp32, of its k images. Images are made
    8-bit first, as if they were written. On a CPU features are computed on one thread of each process, so that they do
    not depend on how many processes share it.

    Args:
        extractor: The network, an `Inception`.
    """

    @contextlib.contextmanager
    def writing(shard: Shard) -> Iterator[Add]:
        held: dict[str, Any] = {}
        done = 0

        def add(part: Samples) -> None:
            nonlocal done
            for images in to_uint8(part.images).split(IN_A_PASS):
                with one_thread():
                    found = extractor.features(images)
                rows = slice(done, done + len(found))
                done = rows.stop
                for kind in KINDS:
                    values = getattr(found, kind).detach().float().cpu().numpy()
                    if kind not in held:
                        held[kind] = np.full((len(shard.numbers), values.shape[1]), np.nan, np.float32)
                    held[kind][rows] = values

        with replacing(shard.out / f"{shard.name}.npz", sweep=SWEEP) as partial:
            yield add
            with partial.open("wb") as file:
                np.savez(file, **held)

    return Format(f"{NAME} of {extractor.name}", writing, ".npz")


def holds_features(path: PathLike) -> bool:
    """Returns whether this is the folder of a run that wrote features, and is done."""
    return (Path(path) / MANIFEST).is_file() and shard_files(path)[0].startswith(NAME)


def read_features(out: PathLike) -> Iterator[Features]:
    """Yields the features of each shard of a run that is done, in the order of the images.

    Args:
        out: The folder of the run.

    Raises:
        ArgumentError: The manifest is damaged.
        DataError: As in `shard_files`; or the shards hold no features.
    """
    format, paths = shard_files(out)
    if not format.startswith(NAME):
        raise DataError(f"{str(out)!r}: no features, but {format}")
    for path in paths:
        with np.load(path, allow_pickle=False) as file:
            yield Features(*(torch.from_numpy(file[kind]) for kind in KINDS))
