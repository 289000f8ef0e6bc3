"""Features are written in shards, as images would be.

A run that writes them is one of `sampling/sharded`: any number of processes divide it, and it goes on however it was
stopped. What is measured of the shards does not depend on who made them, as they are read in the order of the images.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..checks import Count, check_count
from ..devices import torch_threads
from ..errors import DataError
from ..files import PathLike, replacing
from ..images import to_uint8
from ..limits import MOST_BATCH
from ..read_ahead import own_cores
from ..sampling.report import Samples
from ..sampling.sharded import Format, is_run, processes_of_environment, shard_files
from ..sampling.sharded.formats import SWEEP, Add, Shard
from ..sampling.sharded.job import MANIFEST, Job
from ..sampling.sharded.job_bar import JobBar
from ..sampling.sharded.plan import ShardPlan
from .features import Features
from .sources import ImageSource

NAME = "features"
KINDS = ("pooled", "spatial", "logits")
IN_A_PASS = 64  # images, of 299×299 in Inception-v3, whatever the batch that they are drawn in
SHARD_SIZE = 1024  # images
LOOK_SECONDS = 0.5  # between two looks at what other processes do


class Extractor(Protocol):
    """An `Extractor` makes features of images, as `Inception` does.

    name: what these depend on. device: where it computes; on a CPU, several threads may call it at once.
    """

    device: torch.device

    @property
    def name(self) -> str: ...

    def features(self, images: Tensor) -> Features: ...


def compute_features(batches: Iterable[Tensor], extractor: Extractor) -> Iterator[Features]:
    """Yields the features of each batch.

    On a CPU each pass takes one thread, as the sums of torch's convolutions depend on how many there are, and as many
    passes run at once as there are cores.

    Args:
        batches: Batches (B, ch, H, W) uint8.
        extractor: The network.
    """
    if extractor.device.type != "cpu":
        yield from map(extractor.features, batches)
        return
    passes: deque[Future[Features]] = deque()
    with torch_threads(1), ThreadPoolExecutor(own_cores()) as pool:
        try:
            for batch in batches:
                passes.append(pool.submit(extractor.features, batch))
                if len(passes) > own_cores():
                    yield passes.popleft().result()
            while passes:
                yield passes.popleft().result()
        finally:
            for each in passes:
                each.cancel()


class _Arrays:
    """An `_Arrays` collects the features of n images, and writes them as a `.npz` file of arrays (n, d) fp32."""

    def __init__(self, n: int):
        self.n, self.done = n, 0
        self._held: dict[str, Any] = {}

    def add(self, found: Features) -> None:
        rows = slice(self.done, self.done + len(found))
        self.done = rows.stop
        for kind in KINDS:
            values = getattr(found, kind).detach().float().cpu().numpy()
            if kind not in self._held:
                self._held[kind] = np.full((self.n, values.shape[1]), np.nan, np.float32)
            self._held[kind][rows] = values

    def write(self, path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, **self._held)


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
        held = _Arrays(len(shard.numbers))

        def add(part: Samples) -> None:
            for images in to_uint8(part.images).split(IN_A_PASS):
                with torch_threads(1 if extractor.device.type == "cpu" else None):
                    held.add(extractor.features(images))

        with replacing(shard.out / f"{shard.name}.npz", sweep=SWEEP) as partial:
            yield add
            held.write(partial)

    return Format(NAME, writing, ".npz", lambda: extractor.name)


def write_features(
    source: ImageSource, extractor: Extractor, out: PathLike, *, batch_size: Count = IN_A_PASS, progress: bool = False
) -> None:
    """Writes the features of images into a folder, and returns when all are there.

    Any number of processes may call this with the same arguments, on machines that share the folder: they divide the
    images, by RANK and WORLD_SIZE of the environment if these are set. However the call ends, the same one goes on.

    Args:
        source: The images.
        extractor: The network, an `Inception`.
        out: The folder: a new or empty one, or that of the same run.
        batch_size: The number of images in a pass.
        progress: Whether to show a bar for all processes, on that with rank 0.

    Raises:
        ArgumentError: The folder holds something else.
        DataError: An image cannot be read; what is there stays.
        OSError: The system refuses to write; what is there stays.
    """
    batch_size = check_count("batch_size", batch_size, high=MOST_BATCH)
    rank, world = processes_of_environment()
    plan = ShardPlan(0, source.n, batch_size * max(1, SHARD_SIZE // batch_size))
    folder = Path(out)
    asked = {"n": source.n, "batch_size": batch_size, **source.facts, "format": f"{NAME} of {extractor.name}"}
    job = Job(folder, plan, asked)
    with job.beginning(LOOK_SECONDS) as first:
        if first:
            job.begin(version("tarflow_fast"), {})
    with JobBar(job, progress and rank == 0, "features", LOOK_SECONDS) as bar, job.noting():
        claims = job.claims(plan.order(rank, world), LOOK_SECONDS, bar.update)
        with contextlib.closing(claims):
            for shard, claim in claims:
                numbers, path = plan.numbers(shard), folder / f"{plan.name(shard)}.npz"
                held = _Arrays(len(numbers))
                for found in compute_features(source.batches(batch_size, numbers), extractor):
                    held.add(found)
                    claim.write(str(held.done))
                    bar.update()
                with replacing(path, sweep=SWEEP) as partial:
                    held.write(partial)
                job.record(shard, path, {})
                bar.update()
        job.finish(LOOK_SECONDS)


def holds_features(path: PathLike) -> bool:
    """Returns whether this is the folder of a run that wrote features, and is done."""
    return is_run(path) and (Path(path) / MANIFEST).is_file() and shard_files(path)[0].startswith(NAME)


def read_features(out: PathLike, batch_size: Count = IN_A_PASS) -> Iterator[Features]:
    """Yields the features of a run that is done, in the order of the images.

    Args:
        out: The folder of the run.
        batch_size: The number of images in a batch; the last one of a shard may have fewer.

    Raises:
        ArgumentError: The manifest is damaged.
        DataError: As in `shard_files`; or the shards hold no features.
    """
    batch_size = check_count("batch_size", batch_size)
    format, paths = shard_files(out)
    if not format.startswith(NAME):
        raise DataError(f"{str(out)!r}: no features, but {format}")
    for path in paths:
        with np.load(path, allow_pickle=False) as file:
            parts = (torch.from_numpy(file[kind]).split(batch_size) for kind in KINDS)
            yield from map(Features, *parts)
