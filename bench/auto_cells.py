"""One cell of `bench auto`: a batch with every fixed choice and with auto, checked, then timed side by side."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tarflow_fast import SolverPlan
from tarflow_fast.engine import Condition
from tarflow_fast.solvers import TOL, Auto, Costs, CostTable, adaptive, make_solvers, sequential, widths

from . import timing
from .auto_entrants import AUTO, BASELINE, PLANNED, Entrant, Problem
from .cpu import DTYPES

ALLOWED = 1.05  # of the best fixed choice's time
HOPELESS = 2.0  # times the fastest fixed choice: not timed again, and not run if it takes so long at best
QUICK = 0.5  # seconds: a run as short is done whatever is expected, and twice if it looks hopeless, as by a hiccup
MOST_RUNS = 12  # of auto, to settle


def settle(auto: Entrant, wanted: Tensor, allowed: float) -> dict[str, Any]:
    """Run a sampler until two runs in a row have the same windows. Says what each run took and chose."""
    taken: list[dict[str, Any]] = []
    settled = False
    while not settled and len(taken) < MOST_RUNS and auto.run(wanted, allowed):
        assert auto.report is not None
        before = taken[-1]["windows"] if taken else None
        taken.append({"seconds": auto.report.seconds, "setup": auto.report.setup_seconds, "windows": auto.windows()})
        settled = taken[-1]["windows"] == before
    return {"settled": settled, "runs": taken}


def costs_of(auto: Entrant) -> tuple[Costs, Costs]:
    """What auto has measured for this batch, and the same measured again: if auto is mistaken, what it is compared with
    must not be chosen by that mistake."""
    solver, engine = auto.sampler._solvers[0], auto.sampler._engines[0]
    assert isinstance(solver, Auto)
    state = engine.begin(auto.problem.z, Condition(auto.problem.y))
    return solver.costs.of(engine, state), CostTable().of(engine, state)


def try_windows(
    auto: Entrant, baseline: Entrant, costs: Costs, wanted: Tensor, allowed: float
) -> tuple[list[Entrant], list[dict[str, str]]]:
    """An entrant for each window, run once, from narrow to wide; and {name, reason} of those that are not run.

    At best a window of so many times the tokens takes as many times fewer passes. So what it takes at best follows
    from the last window that was run (the sequential pass is one of 1) and from the costs of a pass. None is run if the
    baseline failed.
    """
    tried: list[Entrant] = []
    not_run: list[dict[str, str]] = []
    if baseline.reason is not None:
        return tried, not_run
    fastest = last = min(baseline.seconds)
    each = costs.token  # seconds of a pass for each token of its window, of the last one
    for window in widths(auto.problem.tokens):
        name = f"window {window}"
        at_best = last * costs.of_pass(window) / window / each
        if at_best > max(HOPELESS * fastest, QUICK):
            times = at_best / fastest
            not_run.append({"name": name, "reason": f"takes {times:.1f} times as long as the fastest at best"})
            continue
        solver = functools.partial(adaptive, tol=TOL[DTYPES[auto.problem.dtype]], window=window)
        entrant = Entrant.fixed(name, auto, [solver] * auto.problem.model.config.num_blocks)
        tried.append(entrant)
        if entrant.run(wanted, allowed):
            if HOPELESS * fastest < entrant.seconds[0] <= QUICK:
                entrant.run(wanted, allowed)
            last, each = min(entrant.seconds), costs.of_pass(window) / window
            fastest = min(fastest, last)
    return tried, not_run


def judge(samples: Mapping[str, list[float]]) -> dict[str, Any]:
    """Auto against the fixed choice of the least median. ratio: best / auto, by round. slower: median auto / best.

    The least of several medians is lower by chance too: that is to auto's disadvantage.
    """
    fixed = [name for name in samples if name not in (AUTO, PLANNED)]
    best = min(fixed, key=lambda name: timing.spread(samples[name])["median"])
    ratios = timing.pairwise_ratios(samples[best], samples[AUTO])
    slower = timing.spread(timing.pairwise_ratios(samples[AUTO], samples[best]))["median"]
    ratio = {"samples": ratios, **timing.spread(ratios)}
    return {"best": best, "ratio": ratio, "slower": slower, "allowed": ALLOWED, "met": slower <= ALLOWED}


def measure(
    problem: Problem, plan: SolverPlan | None, *, repeat: int, budget: float, timer: timing.Timer
) -> dict[str, Any]:
    """An entry of the record's "cells". Raises NonFiniteError if the sequential pass is not finite."""
    wanted, allowed = problem.yardstick()
    auto = Entrant(AUTO, problem, problem.sampler("auto"))
    settling = settle(auto, wanted, allowed)
    blocks = problem.model.config.num_blocks
    baseline = Entrant.fixed(BASELINE, auto, [sequential] * blocks)
    costs, again = costs_of(auto)
    baseline.run(wanted, allowed)
    windows, not_run = try_windows(auto, baseline, again, wanted, allowed)
    entrants = [baseline, *windows, auto]
    if plan is not None:
        solvers = make_solvers("auto", None, plan, dtype=DTYPES[problem.dtype], blocks=blocks, tokens=problem.tokens)
        entrants.append(Entrant.fixed(PLANNED, auto, solvers))
        settle(entrants[-1], wanted, allowed)
    failed = {entrant.name: entrant.reason for entrant in entrants if entrant.reason is not None}
    passed = [entrant for entrant in entrants if entrant.reason is None]
    samples: dict[str, list[float]] = {}
    if not {BASELINE, AUTO} & failed.keys():
        fastest = min(min(entrant.seconds) for entrant in passed if entrant.name not in (AUTO, PLANNED))
        chosen = [e for e in passed if e.name in (BASELINE, AUTO, PLANNED) or min(e.seconds) <= HOPELESS * fastest]
        contestants = {entrant.name: entrant.reverse for entrant in chosen}
        samples = timing.alternate(contestants, repeat=repeat, budget=budget, timer=timer)
    errors = [entrant.error for entrant in passed if entrant.error is not None]
    return {
        "label": problem.label,
        "backend": auto.sampler.backend,
        "tokens": problem.tokens,
        "check": {
            "passed": not failed,
            "max_error": max(errors, default=None),
            "tolerance": allowed,
            "reason": "; ".join(f"{name}: {reason}" for name, reason in failed.items()) or None,
        },
        "costs": [{"token": each.token, "passes": list(each.passes.items())} for each in (costs, again)],
        "settling": settling,
        "first": settling["runs"][0]["seconds"] / timing.spread(samples[BASELINE])["median"] if samples else None,
        "left_out": [{"name": name, "reason": reason} for name, reason in failed.items()],
        "not_run": not_run,
        "runs": [entrant.entry(samples) for entrant in passed],
        "verdict": judge(samples) if samples else None,
    }


def failed(problem: Problem, reason: str) -> dict[str, Any]:
    """The entry of a cell that has nothing to compare with."""
    return {
        "label": problem.label,
        "backend": problem.backend,
        "tokens": problem.tokens,
        "check": {"passed": False, "max_error": None, "tolerance": None, "reason": reason},
        "costs": [],
        "settling": {"settled": False, "runs": []},
        "first": None,
        "left_out": [{"name": BASELINE, "reason": reason}],
        "not_run": [],
        "runs": [],
        "verdict": None,
    }
