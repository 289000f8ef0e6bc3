"""Times taken side by side, and their spread."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

Clock = Callable[[], float]
Timer = Callable[[Callable[[], object]], float]
"""Runs a function once; how many seconds it took."""

REST = 0.03  # seconds before each run: OpenMP threads of the contestant before spin on for some milliseconds


def wall(run: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    before = clock()
    run()
    return clock() - before


def cuda_events(run: Callable[[], object]) -> float:
    """From when the GPU, idle before, reaches what `run` gives it until it is through with all of that."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def timer_of(device: torch.device) -> Timer:
    return cuda_events if device.type == "cuda" else wall


def alternate(
    contestants: Mapping[str, Callable[[], object]],
    *,
    repeat: int,
    budget: float,
    clock: Clock = time.perf_counter,
    timer: Timer | None = None,
) -> dict[str, list[float]]:
    """Seconds of each contestant in each round: A B A B …, in the order given, each after a short rest.

    Contestants must be warm: run each once before. repeat: rounds wanted, >= 1. budget: seconds; a round that by the
    longest one so far would end later is not begun, but the first always runs. So there may be fewer samples than
    `repeat`; sample i of every contestant is from round i. timer: measures a run; default by `clock`.
    """
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    started = clock()
    longest = 0.0
    for number in range(repeat):
        round_started = clock()
        if number and round_started - started + longest > budget:
            break
        for name, run in contestants.items():
            time.sleep(REST)
            samples[name].append(wall(run, clock) if timer is None else timer(run))
        longest = max(longest, clock() - round_started)
    return samples


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile (linear interpolation)."""
    p20, median, p80 = np.percentile(values, [20, 50, 80]).tolist()
    return {"median": median, "p20": p20, "p80": p80}


def pairwise_ratios(baseline: Sequence[float], ours: Sequence[float]) -> list[float]:
    """baseline / ours, round by round: how many times faster ours was; drift of the machine cancels.

    A baseline that was too slow to be run again has one sample, and every round is set against that.
    """
    baseline = list(baseline) * len(ours) if len(baseline) == 1 else baseline
    return [a / b for a, b in zip(baseline, ours, strict=True)]
