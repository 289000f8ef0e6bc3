"""CUDA graphs: a sequence of launches that is captured once and replayed in one go, and the time that it takes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from statistics import median

import torch
from triton.runtime.errors import OutOfResources


class CaptureError(RuntimeError):
    """Launches could not be captured. Nothing was launched, and the device is as it was."""


REPLAYS = 7  # the time is the median of so many replays


def capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Returns a graph of what `run` launches on the current device, without executing it.

    Every kernel must have been launched before, because to load one is not allowed during capture, and no memory may be
    allocated. Other threads may go on using the device. Raises CaptureError.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    collecting = gc.isenabled()
    gc.disable()  # it might free another graph, which would break the capture
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                run()
            finally:
                graph.capture_end()
    except RuntimeError as error:
        raise CaptureError(str(error)) from error
    finally:
        if collecting:
            gc.enable()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


def timed(run: Callable[[], object], before: Callable[[], object] = lambda: None) -> float | None:
    """Returns the seconds that the launches of `run` take as a graph, or None if they do not fit on this device.

    before: a function that is called ahead of each replay, outside of the time.
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
