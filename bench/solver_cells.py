"""One cell of `bench solver`: a flow block, solved by every policy from the same input, checked and timed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tarflow_fast import TarFlow
from tarflow_fast.backend import make_engines
from tarflow_fast.engine import BlockEngine, BlockState, Condition, Guidance
from tarflow_fast.sampling.noise import latent_noise
from tarflow_fast.solvers import Solution, Solver, adaptive, sequential

from . import timing
from .policies import gs_jacobi, jacobi

TOLS = (1e-2, 1e-3, 1e-4)
PUBLISHED_THRESHOLD = 0.5
BASELINE = "sequential"
FINAL = 1e-3  # a token is final if it is this near to the sequential one

# What adaptive keeps satisfies x_i = F_i(x_<i) + e_i with |e_i| <= tol, so its error is (1 − L)⁻¹ e to first order, L
# being the strictly triangular Jacobian of F. How much that amplifies is the block's own: 1 to 11 times in the shipped
# model, guided or not. A frontier that went too far leaves errors of the guesses' size instead, hundreds of times tol.
BOUND = 20.0


@dataclass(frozen=True)
class Policy:
    """A solver with its settings, as the record has them."""

    name: str
    settings: dict[str, float]
    solver: Solver


def policies(segments: int, gs_passes: int) -> list[Policy]:
    """The baseline first."""
    return [
        Policy(BASELINE, {}, sequential),
        *(Policy(f"adaptive {tol:g}", {"tol": tol}, functools.partial(adaptive, tol=tol)) for tol in TOLS),
        *(
            Policy(
                f"all-Jacobi {threshold:g}", {"threshold": threshold}, functools.partial(jacobi, threshold=threshold)
            )
            for threshold in (PUBLISHED_THRESHOLD, *TOLS)
        ),
        Policy(
            f"GS-Jacobi {segments}x{gs_passes}",
            {"segments": segments, "passes": gs_passes},
            functools.partial(gs_jacobi, segments=segments, passes=gs_passes),
        ),
    ]


@dataclass
class Problem:
    """One block's inverse of one batch. z, wanted: (B, T, D), the input and the sequential result, in its own order."""

    block: int
    engine: BlockEngine
    z: Tensor
    condition: Condition
    wanted: Tensor = field(init=False)
    _spent: BlockState | None = None

    def __post_init__(self) -> None:
        state = self.begin()
        sequential(self.engine, state)
        self.wanted = state.x

    def begin(self) -> BlockState:
        self._spent = self.engine.begin(self.z, self.condition, spent=self._spent)
        return self._spent

    def solve(self, solver: Solver) -> Solution:
        return solver(self.engine, self.begin(), None)

    def error(self, x: Tensor) -> float | None:
        """max |x − wanted|; None if that is no number."""
        return finite((x - self.wanted).abs().max())

    def final(self, x: Tensor) -> int:
        """Tokens from the first on that are within FINAL of the sequential ones, in the worst sample."""
        return int(((x - self.wanted).abs().amax(-1) <= FINAL).cumprod(1).sum(1).min())


def finite(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


@torch.no_grad()
def problems(
    model: TarFlow, backend: str, device: torch.device, *, batch: int, guidance: float, seed: int
) -> Iterator[Problem]:
    """The blocks in the order of sampling, each from the sequential result of the one before.

    Labels go round the classes and "no class".
    """
    config = model.config
    weights = map(model.block_weights, range(config.num_blocks))
    engines = make_engines(backend, weights, device=device, dtype=torch.float32, compile=False)
    labels = None
    if config.num_classes:
        labels = torch.arange(batch, device=device) % (config.num_classes + 1)
        labels = labels.masked_fill(labels == config.num_classes, -1)
    condition = Condition(labels, Guidance(guidance))
    x = latent_noise(seed, range(batch), config.num_patches, config.token_dim).to(device) * model.var.to(device).sqrt()
    for k in reversed(range(config.num_blocks)):
        order = config.permutation(k)
        problem = Problem(k, engines[k], order.enter(x), condition)
        yield problem
        x = order.leave(problem.wanted)


def examine(problem: Problem, policy: Policy) -> dict[str, Any]:
    """A run without times.

    final: of the state before the first pass and after each (`Problem.final`). advance: tokens gained by a pass.
    evaluations: for each image. residual: what the solver states; None if it states none.
    """
    state = problem.begin()
    T = state.x.shape[1]
    final = [problem.final(state.x)]
    solution = policy.solver(problem.engine, state, lambda tokens: final.append(problem.final(state.x)))
    return {
        "name": policy.name,
        "settings": policy.settings,
        "passes": solution.passes,
        "evaluations": solution.evaluations / state.x.shape[0],
        "advance": (T - 1) / solution.passes if solution.passes else 0.0,
        "max_error": problem.error(state.x),
        "residual": finite(solution.residual.max()),
        "final": final if len(final) == solution.passes + 1 else None,  # engines may report several steps at once
        "seconds": [],
    }


@torch.no_grad()
def jacobi_errors(problem: Problem, until: float) -> list[float | None]:
    """The largest error after 1, 2, … passes over all tokens, to the first that is no larger than `until`."""
    state = problem.begin()
    T = state.x.shape[1]
    errors: list[float | None] = []
    while len(errors) < T - 1 and not (errors and errors[-1] is not None and errors[-1] <= until):
        problem.engine.fixed_point(state, 1, T)
        errors.append(problem.error(state.x))
    return errors


def check(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Adaptive's errors against BOUND · tol; the figures are of the run that is nearest to its bound, or beyond."""
    worst: dict[str, Any] = {"passed": True, "max_error": 0.0, "tolerance": math.inf, "reason": None}
    for run in runs:
        if "tol" not in run["settings"]:
            continue
        error, tolerance = run["max_error"], BOUND * run["settings"]["tol"]
        if error is None:
            return {"passed": False, "max_error": None, "tolerance": tolerance, "reason": f"{run['name']}: not finite"}
        if error * worst["tolerance"] >= worst["max_error"] * tolerance:
            why = f"{run['name']}: {error:.1e} from sequential, allowed {tolerance:.1e}" if error > tolerance else None
            worst = {"passed": why is None, "max_error": error, "tolerance": tolerance, "reason": why}
    return worst


def measure(
    problem: Problem,
    contestants: Sequence[Policy],
    *,
    repeat: int,
    budget: float,
    timer: Callable[[Callable[[], object]], float],
) -> dict[str, Any]:
    """An entry of the record's "cells"; its runs have times if the check passed."""
    T = problem.z.shape[1]
    entry: dict[str, Any] = {"label": {"block": problem.block}, "tokens": T, "runs": [], "jacobi_errors": []}
    entry["largest"] = finite(problem.wanted.abs().max())
    if entry["largest"] is None:
        failed = {"passed": False, "max_error": None, "tolerance": None, "reason": "sequential: not finite"}
        return {**entry, "check": failed}
    runs = [examine(problem, policy) for policy in contestants]
    entry.update(runs=runs, check=check(runs))
    ours = [run for run in runs if "tol" in run["settings"] and run["max_error"] is not None]
    errors = jacobi_errors(problem, min((run["max_error"] for run in ours), default=math.inf))
    entry["jacobi_errors"] = errors
    for run in ours:
        reached = (n for n, error in enumerate(errors, 1) if error is not None and error <= run["max_error"])
        run["jacobi_evaluations"] = next(reached, T - 1) * (T - 1)
    if entry["check"]["passed"]:
        samples = timing.alternate(
            {policy.name: functools.partial(problem.solve, policy.solver) for policy in contestants},
            repeat=repeat,
            budget=budget,
            timer=timer,
        )
        for run in runs:
            run.update(seconds=samples[run["name"]], **timing.spread(samples[run["name"]]))
            if run["name"] != BASELINE:
                ratios = timing.pairwise_ratios(samples[BASELINE], samples[run["name"]])
                run["ratio"] = {"samples": ratios, **timing.spread(ratios)}
    return entry
