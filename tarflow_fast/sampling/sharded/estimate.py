"""What a run costs is told by one batch of it: time, memory, disk."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from ...checks import Count
from .formats import Shard
from .run import Run


def estimate(run: Run, batch_size: Count | None = None) -> dict[str, Any]:
    """Draws one batch of a run twice, the second time on the clock, and returns what the whole run will cost.

    Nothing is written to the run's folder. Each process of the run measures for itself, so that they take from each
    other what they will take in the run.

    Args:
        run: The run.
        batch_size: As in `draw_shards`.

    Returns:
        A dict of plain values: "images_left", those that are not there yet; "processes"; "batch_size";
        "batch_seconds", with writing; "images_per_second" of all processes and "seconds" for the images left, if all
        are as quick; "disk", the bytes of these images, and "disk_free"; "memory", the bytes of this process; and
        "device_memory", the largest number of bytes that it had on a GPU, or None.
    """
    batch = run.prepare(batch_size)
    numbers = range(run.plan.first, run.plan.first + batch)
    with tempfile.TemporaryDirectory() as folder:
        place = Shard(Path(folder), "shard", numbers, run.flow.data_shape, run.folders)
        started = time.perf_counter()
        parts = run.stream(numbers, batch)
        with run.format.writing(place) as add, contextlib.closing(parts):
            for part in parts:
                add(part)
        seconds = time.perf_counter() - started
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    left = run.plan.n - run.job.images()
    speed = run.world * batch / seconds
    there = next(path for path in (run.out.absolute(), *run.out.absolute().parents) if path.is_dir())
    cuda = run.sampler.device.type == "cuda"
    return {
        "images_left": left,
        "processes": run.world,
        "batch_size": batch,
        "batch_seconds": seconds,
        "images_per_second": speed,
        "seconds": left / speed,
        "disk": round(left * size / batch),
        "disk_free": shutil.disk_usage(there).free,
        "memory": int(psutil.Process().memory_info().rss),
        "device_memory": torch.cuda.max_memory_allocated(run.sampler.device) if cuda else None,
    }
