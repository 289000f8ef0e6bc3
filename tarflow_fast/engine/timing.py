"""The timing of an engine's runs, without the setup that it does once for a shape."""

from __future__ import annotations

import time
from collections.abc import Callable

from .contract import BlockEngine

STEPS = 8  # tokens of the sequential pass that are timed together: as many as engines put into one CUDA graph
RUNS, SECONDS = (2, 7), 0.01  # least and most runs, and the time after which there are no more than the least


def seconds(engine: BlockEngine, run: Callable[[], None]) -> float:
    """Returns the shortest time of several runs, in seconds. A run in which the engine sets itself up does not count.

    run: a function without arguments that returns when the device has finished.
    """
    taken: list[float] = []
    while len(taken) < RUNS[0] or (len(taken) < RUNS[1] and sum(taken) < SECONDS):
        setup, started = engine.setup_seconds, time.perf_counter()
        run()
        if engine.setup_seconds == setup:
            taken.append(time.perf_counter() - started)
    return min(taken)
