"""How a flow block is inverted: strategies over one engine's passes. Nothing here knows a backend."""

from __future__ import annotations

import functools

from ..checks import check_choice, check_number
from ..errors import ArgumentError
from .adaptive import adaptive
from .auto import Auto, CostTable
from .costs import Costs
from .pace import Pace, widths
from .plan import SolverPlan
from .sequential import sequential
from .solution import Solution, Solver

SOLVERS = ("auto", "sequential", "adaptive")
TOL = 3e-5
"""Of the parallel passes, if none is given: images of trained models are then within 1e-3 of the sequential ones."""


def make_solvers(solver: str, tol: float | None, plan: SolverPlan | None, *, blocks: int, tokens: int) -> list[Solver]:
    """One for each flow block; those of "auto" learn from what goes through them. Raises ArgumentError.

    solver: one of `SOLVERS`. tol: see `adaptive`; None for TOL. plan: of a model of so many blocks and tokens.
    """
    check_choice("solver", solver, SOLVERS)
    if solver == "sequential":
        if tol is not None:
            raise ArgumentError("tol", "None with solver='sequential', which is exact; or another solver", tol)
        if plan is not None:
            raise ArgumentError("plan", "None with solver='sequential', which guesses nothing", "a SolverPlan")
        return [sequential] * blocks
    tol = TOL if tol is None else check_number("tol", tol, 0)
    guesses = [None if plan is None else functools.partial(plan.guess, k) for k in range(blocks)]
    if solver == "adaptive":
        return [functools.partial(adaptive, tol=tol, guess=guess) for guess in guesses]
    costs = CostTable()
    paces = [Pace(tokens, {}, {}) if plan is None else plan.pace(k) for k in range(blocks)]
    return [Auto(tol, pace, costs, guess) for pace, guess in zip(paces, guesses, strict=True)]


__all__ = [
    "SOLVERS",
    "TOL",
    "Auto",
    "CostTable",
    "Costs",
    "Pace",
    "Solution",
    "Solver",
    "SolverPlan",
    "adaptive",
    "make_solvers",
    "sequential",
    "widths",
]
