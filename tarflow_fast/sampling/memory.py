"""How many samples fit in memory decides how large a batch is."""

from __future__ import annotations

import math

import torch

from ..checks import Count, check_count
from ..devices import free_memory
from ..engine import BlockEngine
from ..errors import OutOfMemoryError
from ..limits import MOST_BATCH

MAX_BATCH = 256  # beyond this a batch gains no speed, and progress becomes hard to see
MEMORY_SHARE = 0.8  # one batch may take so much of the free memory


def check_room(n: int, data_shape: tuple[int, ...], dtype: torch.dtype, copies: int) -> None:
    """Raises OutOfMemoryError where the CPU's memory cannot hold n images, of this shape and dtype, so many times."""
    each = copies * math.prod(data_shape) * dtype.itemsize
    free = free_memory(torch.device("cpu"))
    if n * each > free:
        raise OutOfMemoryError(
            f"n: {n} images need {n * each / 2**20:.0f} MiB, {free / 2**20:.0f} are free; stream() holds one batch"
        )


def fitting_batch(first: BlockEngine, device: torch.device, n: int, guided: bool, batch_size: Count | None) -> int:
    """Returns the batch size, as asked for if it fits, else the largest that does. Raises OutOfMemoryError.

    first: the engine that a batch comes to first. device: where it runs. n: the number of all samples. guided: whether
    they are guided. batch_size: the size that is asked for, or None.
    """
    if batch_size is not None:
        batch_size = check_count("batch_size", batch_size, high=MOST_BATCH)
    each = first.bytes_per_sample(guided)
    free = free_memory(device) + first.cached_bytes
    fits = int(MEMORY_SHARE * free / each)
    wanted = min(n, MAX_BATCH if batch_size is None else batch_size)
    if fits < 1 or (batch_size is not None and wanted > fits):
        raise OutOfMemoryError(
            f"batch_size: {wanted} samples need {wanted * each / 2**20:.0f} MiB on {device}, {fits} would fit"
        )
    return min(wanted, fits)
