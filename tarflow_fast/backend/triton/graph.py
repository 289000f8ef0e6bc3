"""CUDA graphs: a sequence of launches, captured once and replayed in one go, and what it takes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from statistics import median

import torch
from triton.runtime.errors import OutOfResources

REPLAYS = 7  # whose median is taken


def capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """What `run` launches on the current device, nothing of which is executed.

    Every kernel must have been launched before (to load one is not allowed during capture), and no memory may be
    allocated. Other threads may go on using the device.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    collecting = gc.isenabled()
    gc.disable()  # what it would free may be another graph, whose end no capture survives
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                run()
            finally:
                graph.capture_end()
    finally:
        if collecting:
            gc.enable()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


def timed(run: Callable[[], object], before: Callable[[], object] = lambda: None) -> float | None:
    """Seconds that the launches of `run` take as a graph, or None if they do not fit on this device.

    before: called ahead of each replay, outside of the time.
    """
    try:
        before()
        run()
    except OutOfResources:
        return None
    before()
    graph = capture(run)
    times = []
    for _ in range(REPLAYS):
        before()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return median(times)
