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
from .record import Cell, Check, LeftOut, Run, Spread
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
    """Returns the seconds of a run by the clock."""
    before = clock()
    run()
    return clock() - before


def cuda_events(run: Callable[[], object]) -> float:
    """Returns the seconds from when the GPU, idle before, reaches what `run` gives it until it is through with it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def timer_of(device: torch.device) -> Timer:
    """Returns the timer for runs on this device."""
    return cuda_events if device.type == "cuda" else wall


@dataclass(frozen=True)
class Rounds:
    """Rounds are how candidates take turns. repeat: the number of rounds wanted, >= 1. budget: seconds; a round that by
    the longest one so far would end later is not begun, but the first always runs. device, timer: where candidates run,
    and what times them instead of that device's timer."""

    repeat: int
    budget: float
    device: torch.device = CPU
    timer: Timer | None = None
    clock: Clock = time.perf_counter

    def share(self, share: float) -> Rounds:
        """Returns the same with a share of the budget."""
        return replace(self, budget=share * self.budget)

    def seconds(self, run: Callable[[], object]) -> float:
        """Returns how long one run takes."""
        return (self.timer or timer_of(self.device))(run)

    def alternate(self, candidates: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Returns the seconds of each candidate in each round: A B A B …, in the order given, each after a short rest.

        Candidates must have run before. There may be fewer samples than `repeat`; sample i of each is from round i.
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

    def warm(self, candidates: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Returns what `alternate` does of candidates that have not run before."""
        for run in candidates.values():
            run()
        return self.alternate(candidates)


def spread(values: Sequence[float]) -> Spread:
    """Returns the median, the 20th and the 80th percentile, interpolated linearly."""
    p20, median, p80 = np.percentile(values, [20, 50, 80]).tolist()
    return {"median": median, "p20": p20, "p80": p80}


def ratio(baseline: Sequence[float], ours: Sequence[float]) -> Spread:
    """Returns baseline / ours, round by round: how many times faster ours was; drift of the machine cancels.

    A baseline that was too slow to be run again has one sample, and every round is set against that.
    """
    baseline = list(baseline) * len(ours) if len(baseline) == 1 else baseline
    ratios = [a / b for a, b in zip(baseline, ours, strict=True)]
    return {"samples": ratios, **spread(ratios)}


def timed(name: str, seconds: list[float], **more: Any) -> Any:
    """Returns a part of a record that has times: its name, its samples with their spread, and more."""
    return {"name": name, "seconds": seconds, **spread(seconds), **more}


def runs_of(samples: Mapping[str, list[float]], work: Work | None = None) -> list[Run]:
    """Returns the "runs" of a cell from seconds by name. The first is the baseline; the others have a ratio to it."""
    runs: list[Run] = [timed(name, seconds) for name, seconds in samples.items()]
    for number, run in enumerate(runs):
        if work is not None:
            run["bytes_per_second"], run["flops_per_second"] = work.bytes / run["median"], work.flops / run["median"]
        if number:
            run["ratio"] = ratio(runs[0]["seconds"], run["seconds"])
    return runs


@dataclass
class Trial:
    """A trial is the first run of a candidate, and run is that candidate, warm, if it passed. first_seconds includes
    making it and what it compiles, run_seconds does not. error: the largest difference from the exact result, None
    where there is no number. result: what it returned, None if it raised."""

    run: Callable[[], Tensor] | None
    first_seconds: float
    run_seconds: float = 0.0
    error: float | None = None
    reason: str | None = None
    result: Tensor | None = None


def in_a_line(error: Exception) -> str:
    """Returns an exception as a record keeps it."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:MESSAGE]


def admit(
    make: Candidate,
    exact: Tensor | None,
    allowed: float,
    timer: Timer = wall,
    view: Callable[[Tensor], Tensor] | None = None,
) -> Trial:
    """Makes a candidate, runs it once, and compares: finite, and max |view(result) − exact| ≤ allowed.

    exact: None for a candidate that is what others are compared with. view: by default the result as it is.
    """
    started = time.perf_counter()
    found: list[Tensor] = []
    try:
        run = make()
        run_seconds = timer(lambda: found.append(run()))
        result = view(found[0]) if view else found[0]
    except Exception as error:  # whatever stops one candidate must not cost the others their minutes on the machine
        return Trial(None, time.perf_counter() - started, reason=in_a_line(error))
    trial = Trial(None, time.perf_counter() - started, run_seconds, result=result)
    exact = result if exact is None else exact
    if result.shape != exact.shape:
        trial.reason = f"shape {tuple(result.shape)}, not {tuple(exact.shape)}"
    elif not torch.isfinite(result).all():
        trial.reason = "not finite"
    else:
        trial.error = float((result - exact).abs().max())
        trial.reason = beyond(trial.error, allowed)
    trial.run = run if trial.reason is None else None
    return trial


def beyond(error: float, allowed: float) -> str | None:
    """Returns what is wrong with an error, None if it is allowed; NaN is not."""
    return None if error <= allowed else f"differs by {error:.1e}, more than {allowed:.1e}"


def half_tolerance(error: float, exact: Tensor, dtype: torch.dtype) -> float:
    """Returns what results in a half precision may be off by: twice the yardstick's own error, as two results may be
    that are both as far off, and half a unit of the dtype."""
    return 2 * error + 0.5 * torch.finfo(dtype).eps * float(exact.abs().max())


def admit_all(
    candidates: Mapping[str, Candidate],
    *,
    exact: Tensor | None = None,
    tolerance: float = TOLERANCE,
    yardstick: tuple[str, torch.dtype] | None = None,
    slack: Mapping[str, float] | None = None,
    **how: Any,
) -> tuple[dict[str, Trial], Check]:
    """Returns the first run of every candidate, and the verdict on all of them.

    exact: what view(result) should be; by default the first candidate's. tolerance: of the largest difference; with a
    yardstick, a candidate's name and dtype, it is `half_tolerance`. slack: the factor by which one may exceed it. how:
    the timer and the view of `admit`.
    """
    trials: dict[str, Trial] = {}
    first = next(iter(candidates))
    if exact is None:
        trials[first] = admit(candidates[first], None, math.inf, **how)
        exact = trials[first].result
    if yardstick is not None and exact is not None:
        name, dtype = yardstick
        trials[name] = trials.get(name) or admit(candidates[name], exact, math.inf, **how)
        tolerance = half_tolerance(trials[name].error or 0.0, exact, dtype)
    for name, make in candidates.items():
        trials[name] = trials.get(name) or admit(make, exact, (slack or {}).get(name, 1.0) * tolerance, **how)
    trials = {name: trials[name] for name in candidates}
    errors = [trial.error for trial in trials.values() if trial.error is not None]
    worst = max(errors) if len(errors) == len(trials) and all(map(math.isfinite, errors)) else None
    return trials, check_of(left_out(trials), worst, tolerance)


def check_of(failed: Sequence[LeftOut], error: float | None, tolerance: float | None) -> Check:
    """Returns the check of candidates of which these have failed."""
    reason = "; ".join(f"{out['name']}: {out['reason']}" for out in failed) or None
    return {"passed": not failed, "max_error": error, "tolerance": tolerance, "reason": reason}


def failed_check(reason: str) -> Check:
    """Returns the check of a case that could not be measured at all."""
    return {"passed": False, "max_error": None, "tolerance": None, "reason": reason}


def left_out(trials: Mapping[str, Any]) -> list[LeftOut]:
    """Returns the candidates that have a reason not to be timed."""
    return [{"name": name, "reason": each.reason} for name, each in trials.items() if each.reason is not None]


def measure_cell(
    case: Any,
    candidates: Mapping[str, Candidate],
    rounds: Rounds,
    *,
    all_or_none: bool = True,
    baseline_share: float = math.inf,
    **how: Any,
) -> Cell:
    """Returns one of a record's "cells", yet to be held to a limit. case: it has a label, a model's sizes, and work.

    candidates: the baseline first. how: see `admit_all`. all_or_none: nothing is timed if one candidate fails; else the
    others are, unless it is the baseline. baseline_share: a baseline that takes longer than this share of the budget is
    not run again: its only sample is its first run.
    """
    trials, check = admit_all(candidates, timer=rounds.seconds, **how)
    baseline = next(iter(candidates))
    warm = {name: trial.run for name, trial in trials.items() if trial.run is not None}
    samples: dict[str, list[float]] = {}
    if baseline in warm and (check["passed"] or not all_or_none):
        if trials[baseline].run_seconds > baseline_share * rounds.budget:
            samples[baseline] = [trials[baseline].run_seconds]
            del warm[baseline]
        samples |= rounds.alternate(warm)
    cell = unmeasured(case, check)
    cell["left_out"], cell["runs"] = left_out(trials), runs_of(samples, case.work)
    for run in cell["runs"]:
        run["first_seconds"], run["max_error"] = trials[run["name"]].first_seconds, trials[run["name"]].error
    return cell


def unmeasured(case: Any, check: Check) -> Cell:
    """Returns a cell without runs."""
    head: Cell = {"label": case.label, "sizes": case.sizes.to_dict(), "check": check, "work": case.work.to_dict()}
    return head | {"left_out": [], "runs": []}
