"""How a flow block is inverted: strategies over one engine's passes. Nothing here knows a backend."""

from __future__ import annotations

import functools

from ..checks import check_choice, check_number
from ..errors import ArgumentError
from .adaptive import adaptive
from .plan import SolverPlan
from .sequential import sequential
from .solution import Solution, Solver

SOLVERS = ("sequential", "adaptive")
TOL = 3e-5
"""Of the adaptive solver, if none is given: images of trained models are then within 1e-3 of the sequential ones."""


def choose_solver(solver: str) -> str:
    """The name of the solver that serves this request: "auto" is the best there is for every block."""
    check_choice("solver", solver, ("auto", *SOLVERS))
    return "sequential" if solver == "auto" else solver


def make_solver(solver: str, tol: float | None, plan: SolverPlan | None = None) -> Solver:
    """solver: a name that `choose_solver` gave. tol: see `adaptive`; None for TOL. Raises ArgumentError.

    plan: only whether there is one is looked at: its guesses are given to the solver with each block.
    """
    if solver == "sequential":
        if tol is not None:
            raise ArgumentError("tol", "None with solver='sequential', which is exact; or solver='adaptive'", tol)
        if plan is not None:
            raise ArgumentError("plan", "None with solver='sequential', which guesses nothing", "a SolverPlan")
        return sequential
    return functools.partial(adaptive, tol=TOL if tol is None else check_number("tol", tol, 0))


__all__ = [
    "SOLVERS",
    "TOL",
    "Solution",
    "Solver",
    "SolverPlan",
    "adaptive",
    "choose_solver",
    "make_solver",
    "sequential",
]
