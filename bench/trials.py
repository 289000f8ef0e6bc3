"""A cell whose contestants need not all be right, quick or affordable: each is admitted by a first run of its own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import record, timing
from .cells import Cell

Contestant = Callable[[], Callable[[], Tensor]]
"""Makes the function to be timed (which packs weights, say), whose result is the one that is checked."""

MESSAGE = 100  # characters of an exception that a record keeps
BASELINE_SHARE = 0.25  # of the time for a cell: a baseline that takes longer than this is not run again


class Budget:
    """Seconds for a whole run, and how long what has been done so far took, by name."""

    def __init__(self, seconds: float, clock: timing.Clock = time.monotonic):
        self.clock, self.end = clock, clock() + seconds
        self.longest: dict[str, float] = {}

    def left(self) -> float:
        return self.end - self.clock()

    def note(self, what: str, seconds: float) -> None:
        self.longest[what] = max(seconds, self.longest.get(what, 0.0))

    def allows(self, what: str, share: float = 1.0) -> bool:
        """Whether the longest of its kind would fit in this share of what is left (the first needs only a start)."""
        return share * self.left() > self.longest.get(what, 0.0)


@dataclass
class Trial:
    """run: the warm contestant, None unless it passed. first_seconds: making it and its first run, compiling included.
    run_seconds: the first run alone. error: largest difference from the exact result, None where there is no number."""

    run: Callable[[], Tensor] | None
    first_seconds: float
    run_seconds: float = 0.0
    error: float | None = None
    reason: str | None = None


def in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:MESSAGE]


def admit(make: Contestant, exact: Tensor, allowed: float, timer: timing.Timer) -> Trial:
    """Make a contestant, run it once, and compare: finite, and max |result − exact| ≤ allowed."""
    started = time.perf_counter()
    found: list[Tensor] = []
    try:
        run = make()
        run_seconds = timer(lambda: found.append(run()))
    except Exception as error:  # whatever stops one contestant must not cost the others their minutes on the machine
        return Trial(None, time.perf_counter() - started, reason=in_a_line(error))
    trial = Trial(None, time.perf_counter() - started, run_seconds)
    (got,) = found
    if got.shape != exact.shape:
        trial.reason = f"shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    elif not torch.isfinite(got).all():
        trial.reason = "not finite"
    else:
        trial.error = float((got - exact).abs().max())
        if trial.error > allowed:
            trial.reason = f"differs by {trial.error:.1e}, more than {allowed:.1e}"
        else:
            trial.run = run
    return trial


def measure_trials(
    cell: Cell,
    contestants: Mapping[str, Contestant],
    exact: Tensor,
    *,
    tolerance: float | None,
    floor: float = 0.0,
    yardstick: str = "",
    slack: Mapping[str, float] | None = None,
    repeat: int,
    seconds: float,
    timer: timing.Timer,
) -> dict[str, Any]:
    """One entry of a record's "cells", yet to be held to a limit. contestants: the baseline first.

    tolerance: on |result − exact|; None: twice the error of the contestant `yardstick`, plus floor. slack: by how much
    a contestant may exceed it. seconds: for the rounds; see `alternate`. A contestant that fails is in "left_out", and
    the check has not passed; the others are timed, unless the baseline is the one.
    """
    baseline = next(iter(contestants))
    slack = slack or {}
    trials: dict[str, Trial] = {}
    if tolerance is None:
        trials[yardstick] = admit(contestants[yardstick], exact, math.inf, timer)
        tolerance = 2 * (trials[yardstick].error or 0.0) + floor
    for name, make in contestants.items():
        if name not in trials:
            trials[name] = admit(make, exact, slack.get(name, 1.0) * tolerance, timer)
    trials = {name: trials[name] for name in contestants}
    errors = [trial.error for trial in trials.values() if trial.error is not None]
    failed = {name: trial.reason for name, trial in trials.items() if trial.reason is not None}
    samples = {} if baseline in failed else _rounds(trials, baseline, repeat, seconds, timer)
    runs = record.runs(samples, cell.work) if samples else []
    for run in runs:
        trial = trials[run["name"]]
        run["first_seconds"], run["max_error"] = trial.first_seconds, trial.error
    return {
        "label": cell.label,
        "sizes": cell.sizes.to_dict(),
        "check": {
            "passed": not failed,
            "max_error": max(errors) if errors and not failed else None,
            "tolerance": tolerance,
            "reason": "; ".join(f"{name}: {reason}" for name, reason in failed.items()) or None,
        },
        "work": cell.work.to_dict(),
        "left_out": [{"name": name, "reason": reason} for name, reason in failed.items()],
        "runs": runs,
    }


def failed_entry(cell: Cell, reason: str) -> dict[str, Any]:
    """The entry of a cell that could not be measured at all."""
    return {
        "label": cell.label,
        "sizes": cell.sizes.to_dict(),
        "check": {"passed": False, "max_error": None, "tolerance": None, "reason": reason},
        "work": cell.work.to_dict(),
        "left_out": [],
        "runs": [],
    }


def _rounds(
    trials: Mapping[str, Trial], baseline: str, repeat: int, seconds: float, timer: timing.Timer
) -> dict[str, list[float]]:
    """Samples by name. A baseline too slow to take part has one, its first run (it was warm), the others several."""
    warm = {name: trial.run for name, trial in trials.items() if trial.run is not None}
    once = trials[baseline].run_seconds
    if once <= BASELINE_SHARE * seconds:
        return timing.alternate(warm, repeat=repeat, budget=seconds, timer=timer)
    del warm[baseline]
    return {baseline: [once], **timing.alternate(warm, repeat=repeat, budget=seconds, timer=timer)}
