"""The bench's one way to time: candidates are made, each is checked by a first run of its own, and those that passed
take turns. Every ratio of the bench is assembled here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .machine import CPU
from .record import Cell, Check, LeftOut, Ratio, Run, Spread
from .roofline import Work

Clock = Callable[[], float]
Timer = Callable[[Callable[[], object]], float]
"""Runs a function once and returns how many seconds it took."""
Candidate = Callable[[], Callable[[], Tensor]]
"""Makes the function to be timed (which packs weights, say), whose result is the one that is checked."""

REST = 0.03  # seconds before each run: OpenMP threads of the candidate before spin on for some milliseconds
MESSAGE = 100  # characters of an exception that a record keeps
TOLERANCE = 2e-4  # fp32, absolute, on values of order 1

# What adaptive keeps satisfies x_i = F_i(x_<i) + e_i with |e_i| <= tol, so its error is (1 − L)⁻¹ e to first order, L
# being the strictly triangular Jacobian of F. How much that amplifies is the block's own: 1 to 11 times in the shipped
# model, guided or not. A frontier that went too far leaves errors of the guesses' size instead, hundreds of times tol.
ADAPTIVE_BOUND = 20.0


def wall(run: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    before = clock()
    run()
    return clock() - before


def cuda_events(run: Callable[[], object]) -> float:
    """The time from when the GPU, idle before, reaches what `run` gives it until it is through with all of that."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def timer_of(device: torch.device) -> Timer:
    return cuda_events if device.type == "cuda" else wall


@dataclass(frozen=True)
class Rounds:
    """How candidates take turns. repeat: rounds wanted, >= 1. budget: seconds; a round that by the longest one so far
    would end later is not begun, but the first always runs. device: where they run. timer: measures a run there."""

    repeat: int
    budget: float
    device: torch.device = CPU
    timer: Timer | None = None
    clock: Clock = time.perf_counter

    def share(self, share: float) -> Rounds:
        """The same with a share of the budget."""
        return replace(self, budget=share * self.budget)

    def seconds(self, run: Callable[[], object]) -> float:
        return (self.timer or timer_of(self.device))(run)

    def alternate(self, candidates: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        """The seconds of each candidate in each round: A B A B …, in the order given, each after a short rest.

        Candidates must be warm: run each once before. There may be fewer samples than `repeat`; sample i of every
        candidate is from round i.
        """
        samples: dict[str, list[float]] = {name: [] for name in candidates}
        started, longest = self.clock(), 0.0
        for number in range(self.repeat):
            round_started = self.clock()
            if number and round_started - started + longest > self.budget:
                break
            for name, run in candidates.items():
                time.sleep(REST)
                samples[name].append(self.seconds(run))
            longest = max(longest, self.clock() - round_started)
        return samples


def spread(values: Sequence[float]) -> Spread:
    """The median, the 20th and the 80th percentile (linear interpolation)."""
    p20, median, p80 = np.percentile(values, [20, 50, 80]).tolist()
    return {"median": median, "p20": p20, "p80": p80}


def ratio(baseline: Sequence[float], ours: Sequence[float]) -> Ratio:
    """baseline / ours, round by round: how many times faster ours was; drift of the machine cancels.

    A baseline that was too slow to be run again has one sample, and every round is set against that.
    """
    baseline = list(baseline) * len(ours) if len(baseline) == 1 else baseline
    ratios = [a / b for a, b in zip(baseline, ours, strict=True)]
    return {"samples": ratios, **spread(ratios)}


def timed(name: str, seconds: list[float], **more: Any) -> Any:
    """A part of a record that has times: its name, its samples with their spread, and more."""
    return {"name": name, "seconds": seconds, **spread(seconds), **more}


def runs_of(samples: Mapping[str, list[float]], work: Work | None = None) -> list[Run]:
    """The "runs" of a cell, from seconds by name, the baseline first; all others have their ratio to it."""
    runs: list[Run] = [timed(name, seconds) for name, seconds in samples.items()]
    for number, run in enumerate(runs):
        if work is not None:
            run["bytes_per_second"], run["flops_per_second"] = work.bytes / run["median"], work.flops / run["median"]
        if number:
            run["ratio"] = ratio(runs[0]["seconds"], run["seconds"])
    return runs


@dataclass
class Trial:
    """The first run of a candidate. run: the warm candidate, None unless it passed. first_seconds: making it and its
    first run, compiling included; run_seconds: the run alone. error: the largest difference from the exact result, None
    where there is no number. result: what it returned, None if it raised."""

    run: Callable[[], Tensor] | None
    first_seconds: float
    run_seconds: float = 0.0
    error: float | None = None
    reason: str | None = None
    result: Tensor | None = None


def in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:MESSAGE]


def same(result: Tensor) -> Tensor:
    return result


def admit(
    make: Candidate,
    exact: Tensor | None,
    allowed: float,
    timer: Timer = wall,
    view: Callable[[Tensor], Tensor] = same,
) -> Trial:
    """Make a candidate, run it once, and compare: finite, and max |view(result) − exact| ≤ allowed.

    exact: None for a candidate that is what others are compared with.
    """
    started = time.perf_counter()
    found: list[Tensor] = []
    try:
        run = make()
        run_seconds = timer(lambda: found.append(run()))
        got = view(found[0])
    except Exception as error:  # whatever stops one candidate must not cost the others their minutes on the machine
        return Trial(None, time.perf_counter() - started, reason=in_a_line(error))
    trial = Trial(None, time.perf_counter() - started, run_seconds, result=got)
    exact = got if exact is None else exact
    if got.shape != exact.shape:
        trial.reason = f"shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    elif not torch.isfinite(got).all():
        trial.reason = "not finite"
    else:
        trial.error = float((got - exact).abs().max())
        if trial.error <= allowed:
            trial.run = run
        else:
            trial.reason = f"differs by {trial.error:.1e}, more than {allowed:.1e}"
    return trial


def half_tolerance(error: float, exact: Tensor, dtype: torch.dtype) -> float:
    """What results in a half precision may be off by: twice the yardstick's own error, as two results may be that are
    both as far off, and half a unit of the dtype."""
    return 2 * error + 0.5 * torch.finfo(dtype).eps * float(exact.abs().max())


def admit_all(
    candidates: Mapping[str, Candidate],
    *,
    exact: Tensor | None = None,
    tolerance: float = TOLERANCE,
    yardstick: tuple[str, torch.dtype] | None = None,
    slack: Mapping[str, float] | None = None,
    timer: Timer = wall,
    view: Callable[[Tensor], Tensor] = same,
) -> tuple[dict[str, Trial], Check]:
    """The first run of every candidate, and the verdict on all of them.

    exact: what view(result) should be; default the first candidate's. tolerance: on the largest difference; with a
    yardstick, a candidate's name and dtype, it is `half_tolerance`. slack: by which factor one may exceed it.
    """
    trials: dict[str, Trial] = {}
    first = next(iter(candidates))
    if exact is None:
        trials[first] = admit(candidates[first], None, math.inf, timer, view)
        exact = trials[first].result
    if yardstick is not None and exact is not None:
        name, dtype = yardstick
        if name not in trials:
            trials[name] = admit(candidates[name], exact, math.inf, timer, view)
        tolerance = half_tolerance(trials[name].error or 0.0, exact, dtype)
    for name, make in candidates.items():
        if name not in trials:
            trials[name] = admit(make, exact, (slack or {}).get(name, 1.0) * tolerance, timer, view)
    trials = {name: trials[name] for name in candidates}
    errors = [trial.error for trial in trials.values() if trial.error is not None]
    reason = "; ".join(f"{out['name']}: {out['reason']}" for out in left_out(trials))
    numbers = len(errors) == len(trials) and all(map(math.isfinite, errors))
    worst = max(errors) if numbers else None
    return trials, {"passed": not reason, "max_error": worst, "tolerance": tolerance, "reason": reason or None}


def left_out(trials: Mapping[str, Trial]) -> list[LeftOut]:
    return [{"name": name, "reason": trial.reason} for name, trial in trials.items() if trial.reason is not None]


def measure_cell(
    case: Any,
    candidates: Mapping[str, Candidate],
    rounds: Rounds,
    *,
    all_or_none: bool = True,
    baseline_share: float = math.inf,
    **how: Any,
) -> Cell:
    """One entry of a record's "cells", yet to be held to a limit. case: has a label, and a model's sizes and work.

    candidates: the baseline first. how: see `admit_all`. all_or_none: nothing is timed if one candidate fails; else the
    others are, unless it is the baseline. baseline_share: a baseline that takes longer than this share of the budget is
    not run again: its only sample is its first run.
    """
    trials, verdict = admit_all(candidates, timer=rounds.seconds, **how)
    baseline = next(iter(candidates))
    warm = {name: trial.run for name, trial in trials.items() if trial.run is not None}
    samples: dict[str, list[float]] = {}
    if baseline in warm and (verdict["passed"] or not all_or_none):
        if trials[baseline].run_seconds > baseline_share * rounds.budget:
            samples[baseline] = [trials[baseline].run_seconds]
            del warm[baseline]
        samples |= rounds.alternate(warm)
    cell = unmeasured(case, verdict)
    cell["left_out"], cell["runs"] = left_out(trials), runs_of(samples, case.work)
    for run in cell["runs"]:
        run["first_seconds"], run["max_error"] = trials[run["name"]].first_seconds, trials[run["name"]].error
    return cell


def unmeasured(case: Any, check: Check) -> Cell:
    """A cell without runs."""
    head: Cell = {"label": case.label, "sizes": case.sizes.to_dict(), "check": check, "work": case.work.to_dict()}
    return head | {"left_out": [], "runs": []}


def failed_check(reason: str) -> Check:
    """The check of a case that could not be measured at all."""
    return {"passed": False, "max_error": None, "tolerance": None, "reason": reason}
