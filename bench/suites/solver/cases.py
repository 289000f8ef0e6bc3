"""One case of `bench solver`: a flow block, solved by every candidate from the same input, checked and timed."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tarflow_fast import Sampler, TarFlow
from tarflow_fast.engine import BlockEngine, BlockState, Condition, Guidance
from tarflow_fast.solvers import Solution, Solver, adaptive, sequential

from ...common.harness import ADAPTIVE_BOUND as BOUND
from ...common.harness import Rounds, failed_check, runs_of
from ...common.models import labels, latents
from ...common.record import Check
from .baselines import gs_jacobi, jacobi

TOLS = (1e-2, 1e-3, 1e-4)
PUBLISHED_THRESHOLD = 0.5
BASELINE = "sequential"
FINAL = 1e-3  # a token is final if it is this near to the sequential one


@dataclass(frozen=True)
class Candidate:
    """A solver with its settings, as the record has them."""

    name: str
    solver: Solver
    settings: dict[str, Any] = field(default_factory=dict)

    def __call__(self, *how: Any) -> Solution:
        return self.solver(*how, **self.settings)


def candidates(segments: int, gs_passes: int) -> list[Candidate]:
    """Returns the baseline and then the others."""
    return [
        Candidate(BASELINE, sequential),
        *(Candidate(f"adaptive {tol:g}", adaptive, {"tol": tol}) for tol in TOLS),
        *(Candidate(f"all-Jacobi {x:g}", jacobi, {"threshold": x}) for x in (PUBLISHED_THRESHOLD, *TOLS)),
        Candidate(f"GS-Jacobi {segments}x{gs_passes}", gs_jacobi, {"segments": segments, "passes": gs_passes}),
    ]


@dataclass
class Problem:
    """One block's inverse of one batch. z, wanted: (B, T, D), the input and the sequential result, in its own order."""

    block: int
    engine: BlockEngine
    z: Tensor
    condition: Condition
    wanted: Tensor = field(init=False)
    _reuse: BlockState | None = None

    def __post_init__(self) -> None:
        state = self.begin()
        sequential(self.engine, state)
        self.wanted = state.x

    @property
    def label(self) -> dict[str, Any]:
        return {"block": self.block}

    def begin(self) -> BlockState:
        self._reuse = self.engine.begin(self.z, self.condition, reuse=self._reuse)
        return self._reuse

    def solve(self, candidate: Candidate) -> Solution:
        return candidate(self.engine, self.begin(), None)

    def error(self, x: Tensor) -> float | None:
        """Returns max |x − wanted|; None if that is no number."""
        return finite((x - self.wanted).abs().max())

    def final(self, x: Tensor) -> int:
        """Returns how many tokens, from the first on, are within FINAL of the sequential ones in the worst sample."""
        return int(((x - self.wanted).abs().amax(-1) <= FINAL).cumprod(1).sum(1).min())


def finite(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


@torch.no_grad()
def problems(
    model: TarFlow, backend: str, device: torch.device, *, batch: int, guidance: float, seed: int
) -> Iterator[Problem]:
    """Yields the blocks in the order of sampling, each from the sequential result of the one before."""
    sampler = Sampler(model, backend=backend, device=device, solver=BASELINE)
    condition = Condition(labels(model.config, batch, device, none=True), Guidance(guidance))
    x = latents(model.config, batch, seed, device) * model.var.to(device).sqrt()
    for k, stage in reversed(list(enumerate(sampler.flow.stages))):
        problem = Problem(k, sampler.engines[k], stage.enter(x), condition)
        yield problem
        x = stage.leave(problem.wanted)


def examine(problem: Problem, candidate: Candidate) -> dict[str, Any]:
    """Returns a run without times.

    final: of the state before the first pass and after each (`Problem.final`). advance: tokens gained by a pass.
    evaluations: for each image. residual: what the solver states; None if it states none.
    """
    state = problem.begin()
    B, T, _ = state.x.shape
    final = [problem.final(state.x)]
    solution = candidate(problem.engine, state, lambda tokens: final.append(problem.final(state.x)))
    return {
        "name": candidate.name,
        "settings": candidate.settings,
        "passes": solution.passes,
        "evaluations": solution.evaluations / B,
        "advance": (T - 1) / solution.passes if solution.passes else 0.0,
        "max_error": problem.error(state.x),
        "residual": finite(solution.residual.max()),
        "final": final if len(final) == solution.passes + 1 else None,  # engines may report several steps at once
        "seconds": [],
    }


@torch.no_grad()
def jacobi_errors(problem: Problem, until: float) -> list[float | None]:
    """Returns the largest error after 1, 2, … passes over all tokens, to the first that is no larger than `until`."""
    state, errors = problem.begin(), []
    T = state.x.shape[1]
    while len(errors) < T - 1 and not (errors and errors[-1] is not None and errors[-1] <= until):
        problem.engine.fixed_point(state, 1, T)
        errors.append(problem.error(state.x))
    return errors


def check(runs: Sequence[dict[str, Any]]) -> Check:
    """Holds adaptive's errors to BOUND · tol; the figures are of the run that is nearest to its bound, or beyond."""
    worst: Check = {"passed": True, "max_error": 0.0, "tolerance": math.inf, "reason": None}
    for run in (run for run in runs if "tol" in run["settings"]):
        error, tolerance = run["max_error"], BOUND * run["settings"]["tol"]
        if error is None:
            return {"passed": False, "max_error": None, "tolerance": tolerance, "reason": f"{run['name']}: not finite"}
        if error * worst["tolerance"] >= worst["max_error"] * tolerance:
            why = f"{run['name']}: {error:.1e} from sequential, allowed {tolerance:.1e}" if error > tolerance else None
            worst = {"passed": why is None, "max_error": error, "tolerance": tolerance, "reason": why}
    return worst


def measure(problem: Problem, candidates: Sequence[Candidate], rounds: Rounds) -> dict[str, Any]:
    """Returns one of the record's "cells"; its runs are there if the check failed too, with times if it passed.

    largest: the largest |x| of the sequential result; jacobi_errors: see there. A run of adaptive's has
    "jacobi_evaluations": what all-Jacobi evaluates until its error is no larger.
    """
    T, largest = problem.z.shape[1], finite(problem.wanted.abs().max())
    cell: dict[str, Any] = {"label": problem.label, "tokens": T, "largest": largest, "runs": [], "jacobi_errors": []}
    if largest is None:
        return {**cell, "check": failed_check("sequential: not finite")}
    runs = [examine(problem, candidate) for candidate in candidates]
    cell |= {"runs": runs, "check": check(runs)}
    ours = [run for run in runs if "tol" in run["settings"] and run["max_error"] is not None]
    cell["jacobi_errors"] = jacobi_errors(problem, min((run["max_error"] for run in ours), default=math.inf))
    for run in ours:
        passes = enumerate(cell["jacobi_errors"], 1)
        reached = (n for n, error in passes if error is not None and error <= run["max_error"])
        run["jacobi_evaluations"] = next(reached, T - 1) * (T - 1)
    if cell["check"]["passed"]:
        samples = rounds.alternate({each.name: functools.partial(problem.solve, each) for each in candidates})
        for run, times in zip(runs, runs_of(samples), strict=True):
            run.update(times)
    return cell
