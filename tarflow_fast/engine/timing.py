"""What a run of an engine takes, without what it does once for a shape."""

from __future__ import annotations

import time
from collections.abc import Callable

from .contract import BlockEngine

STEPS = 8  # tokens of the sequential pass that are timed together: as many as engines put into one CUDA graph
RUNS, SECONDS = (2, 7), 0.01  # least and most; beyond the least no more than take so long


def seconds(engine: BlockEngine, run: Callable[[], None]) -> float:
    """Of a run that waits for the device: the least of some. Those in which the engine sets itself up do not count."""
    taken: list[float] = []
    while len(taken) < RUNS[0] or (len(taken) < RUNS[1] and sum(taken) < SECONDS):
        setup, started = engine.setup_seconds, time.perf_counter()
        run()
        if engine.setup_seconds == setup:
            taken.append(time.perf_counter() - started)
    return min(taken)
