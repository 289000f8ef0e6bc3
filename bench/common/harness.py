"""The bench's one way to time: candidates are made and checked by a first run, and those that passed take turns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .machine import CPU
from .record import Check, Spread
from .roofline import Work

Timer = Callable[[Callable[[], object]], float]
"""Runs a function once and returns how many seconds it took."""
Candidate = Callable[[], Callable[[], Any]]
"""Makes the function to be timed (which packs weights, say), whose result is the one that is checked."""

REST = 0.03  # seconds before each run: OpenMP threads of the candidate before spin on for some milliseconds
MESSAGE = 100  # characters of an exception that a record keeps
TOLERANCE = 2e-4  # fp32, absolute, on values of order 1

# What adaptive keeps satisfies x_i = F_i(x_<i) + e_i with |e_i| <= tol, so its error is (1 − L)⁻¹ e to first order, L
# being the strictly triangular Jacobian of F. How much that amplifies is the block's own: 1 to 11 times in the shipped
# model, guided or not. A frontier that went too far leaves errors of the guesses' size instead, hundreds of times tol.
ADAPTIVE_BOUND = 20.0


def wall(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
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
    return cuda_events if device.type == "cuda" else wall


@dataclass(frozen=True)
class Case:
    """What one cell measures. label: the table's columns and their values. sizes, work: a model's, and the least that a
    pass of it takes, of cells that are held to limits. threads: None for torch's."""

    label: dict[str, Any]
    sizes: Any = None
    work: Any = None
    dtype: str = "float32"
    threads: int | None = None


@dataclass(frozen=True)
class Rounds:
    """Rounds in which candidates take turns. repeat: how many. budget: seconds; a round that by the longest one so far
    would end later is not begun, but the first always runs. timer: takes the place of the device's own."""

    repeat: int
    budget: float
    device: torch.device = CPU
    timer: Timer | None = None
    clock: Callable[[], float] = time.perf_counter

    def share(self, share: float) -> Rounds:
        return replace(self, budget=share * self.budget)

    def seconds(self, run: Callable[[], object]) -> float:
        return (self.timer or timer_of(self.device))(run)

    def alternate(self, candidates: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Returns the seconds of each candidate in each round: A B A B …, each after a short rest, all run before."""
        samples, started, longest = {name: list[float]() for name in candidates}, self.clock(), 0.0
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
    """Returns the median, the 20th and the 80th percentile, interpolated linearly."""
    p20, median, p80 = np.percentile(values, [20, 50, 80]).tolist()
    return {"median": median, "p20": p20, "p80": p80}


def ratio(baseline: Sequence[float], ours: Sequence[float]) -> Spread:
    """Returns baseline / ours, round by round: how many times faster ours was; drift of the machine cancels. One of the
    two may have been too slow to be run again: its one sample is set against every round of the other."""
    baseline = list(baseline) * len(ours) if len(baseline) == 1 else baseline
    ours = list(ours) * len(baseline) if len(ours) == 1 else ours
    ratios = [a / b for a, b in zip(baseline, ours, strict=True)]
    return {"samples": ratios, **spread(ratios)}


def timed(name: str, seconds: list[float], **more: Any) -> Any:
    """Returns a part of a record that has times: its name, its samples with their spread, and more."""
    return {"name": name, "seconds": seconds, **spread(seconds), **more}


def runs_of(samples: Mapping[str, list[float]], work: Work | None = None) -> list[Any]:
    """Returns the "runs" of a cell from seconds by name. The first is the baseline; the others have a ratio to it."""
    runs = [timed(name, seconds) for name, seconds in samples.items()]
    for number, run in enumerate(runs):
        if work is not None:
            run["bytes_per_second"], run["flops_per_second"] = work.bytes / run["median"], work.flops / run["median"]
        if number:
            run["ratio"] = ratio(runs[0]["seconds"], run["seconds"])
    return runs


def ready(runs: Mapping[str, Callable[[], Any]]) -> dict[str, Candidate]:
    """Returns candidates that need no making."""
    return {name: lambda run=run: run for name, run in runs.items()}  # type: ignore[misc]


@dataclass
class Trial:
    """The first run of a candidate, and its seconds. run: the candidate, warm, if it passed. error: the largest
    difference from the exact result, None where there is no number."""

    run: Callable[[], Any] | None = None
    seconds: float = 0.0
    error: float | None = None
    reason: str | None = None
    result: Tensor | None = None


def in_a_line(error: Exception) -> str:
    """Returns an exception as a record keeps it."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:MESSAGE]


def admit(make: Candidate, exact: Tensor | None, allowed: float, timer: Timer = wall, view: Any = lambda x: x) -> Trial:
    """Makes a candidate and runs it once; it passes if it is finite and max |view(result) − exact| ≤ allowed. exact:
    None for a candidate that is what others are compared with."""
    trial, found = Trial(), list[Any]()

    def once() -> Any:
        found.append(run())
        return found[0]

    try:
        run = make()
        trial.seconds = timer(once)
        trial.result = result = view(found[0])
    except Exception as error:  # whatever stops one candidate must not cost the others their minutes on the machine
        trial.reason = in_a_line(error)
        return trial
    exact = result if exact is None else exact
    if result.shape != exact.shape:
        trial.reason = f"shape {tuple(result.shape)}, not {tuple(exact.shape)}"
    elif not torch.isfinite(result).all():
        trial.reason = "not finite"
    else:
        trial.error = float((result - exact).abs().max())
        if trial.error > allowed:
            trial.reason = f"differs by {trial.error:.1e}, more than {allowed:.1e}"
    trial.run = run if trial.reason is None else None
    return trial


def admit_all(
    candidates: Mapping[str, Candidate],
    *,
    exact: Tensor | None = None,
    tolerance: float = TOLERANCE,
    yardstick: tuple[str, torch.dtype] | None = None,
    slack: Mapping[str, float] = MappingProxyType({}),
    **how: Any,
) -> tuple[dict[str, Trial], Check]:
    """Returns the first run of every candidate, and the verdict on all of them.

    exact: by default the first candidate's result. yardstick: a candidate's name and half precision; the tolerance is
    then twice its own error, as two results may be that are both as far off, and half a unit of the dtype. slack: the
    factor by which one may exceed the tolerance. how: the timer and the view of `admit`.
    """
    trials: dict[str, Trial | None] = dict.fromkeys(candidates)
    if exact is None:
        first = next(iter(candidates))
        trials[first] = found = admit(candidates[first], None, math.inf, **how)
        exact = found.result
    if yardstick is not None and exact is not None:
        name, dtype = yardstick
        trials[name] = found = trials[name] or admit(candidates[name], exact, math.inf, **how)
        tolerance = 2 * (found.error or 0.0) + 0.5 * torch.finfo(dtype).eps * float(exact.abs().max())
    made = {
        name: trial or admit(candidates[name], exact, slack.get(name, 1.0) * tolerance, **how)
        for name, trial in trials.items()
    }
    errors = [math.nan if trial.error is None else trial.error for trial in made.values()]
    worst = max(errors) if all(map(math.isfinite, errors)) else None
    failed = "; ".join(f"{out['name']}: {out['reason']}" for out in left_out(made)) or None
    return made, check_of(failed, worst, tolerance)


def left_out(trials: Mapping[str, Trial]) -> list[dict[str, Any]]:
    """Returns the candidates that have a reason not to be timed."""
    return [{"name": name, "reason": each.reason} for name, each in trials.items() if each.reason is not None]


def check_of(reason: str | None, error: float | None = None, tolerance: float | None = None) -> Check:
    """Returns a check. reason: what is wrong, None if nothing is."""
    return {"passed": reason is None, "max_error": error, "tolerance": tolerance, "reason": reason}


def measure_cell(
    case: Any,
    candidates: Mapping[str, Candidate],
    rounds: Rounds,
    *,
    once: Mapping[str, float] = MappingProxyType({}),
    parts: Mapping[str, float] = MappingProxyType({}),
    **how: Any,
) -> Any:
    """Returns the cell of a case. candidates: the baseline first; what is right is timed if the baseline and another
    one are. once: the share of the budget beyond which a candidate is not run again. parts: the share of the case's
    work that a candidate does, where that is not all; its times are scaled by it, and its run has the "part". how: see
    `admit_all`."""
    trials, check = admit_all(candidates, timer=rounds.seconds, **how)
    warm = {name: trial.run for name, trial in trials.items() if trial.run is not None}
    samples: dict[str, list[float]] = {}
    if next(iter(candidates)) in warm and len(warm) > 1:
        slow = [name for name in warm if trials[name].seconds > once.get(name, math.inf) * rounds.budget]
        samples = {name: [trials[name].seconds] for name in warm}
        samples |= rounds.alternate({name: run for name, run in warm.items() if name not in slow})
        samples |= {name: [each / part for each in samples[name]] for name, part in parts.items() if name in samples}
    runs = runs_of(samples, case.work)
    for run in runs:
        run |= {"part": parts[run["name"]]} if run["name"] in parts else {}
        run["max_error"] = trials[run["name"]].error
    return {**unmeasured(case, check), "left_out": left_out(trials), "runs": runs}


def unmeasured(case: Case, check: Check) -> Any:
    """Returns a cell without runs."""
    found = {"label": case.label, "check": check, "left_out": [], "runs": []}
    more = {"sizes": case.sizes and case.sizes.to_dict(), "work": case.work and case.work._asdict()}
    return {**found, **{name: value for name, value in more.items() if value is not None}}
