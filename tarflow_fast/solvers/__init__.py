"""The solvers: how a flow block is inverted by the passes of one engine. Solvers know no backend."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from ..checks import check_choice, check_number
from ..engine.shape import BlockShape
from ..errors import ArgumentError
from .adaptive import adaptive
from .auto import Auto, CostTable
from .costs import Costs
from .pass_estimate import PassEstimate
from .plan import SolverPlan, check_plan
from .sequential import sequential
from .solution import Solution, Solver
from .trail import errors
from .windows import widths

SOLVERS = ("auto", "sequential", "adaptive")
TOL = {torch.float64: 3e-6, torch.float32: 3e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}
"""The default tolerance of the parallel passes, by the dtype of weights and cache.

In fp32 the images of trained models are then within 1e-3 of the sequential ones. In bf16 they are about as near to
the fp32 images as the sequential bf16 images are. A smaller tolerance would be of no use there, because rounding alone
keeps tokens moving until those before them are the same to the last bit. fp16 has three more bits than bf16, and an
eighth of its tolerance.
"""


class Solvers(list[Solver]):
    """The solvers of a model's flow blocks, one for each.

    costs: the measured costs that the solvers of "auto" share, else None.
    """

    costs: CostTable | None = None

    @property
    def setup_seconds(self) -> float:
        """Returns the seconds spent so far on measuring costs, beside what engines count as their own setup."""
        return 0.0 if self.costs is None else self.costs.seconds


def make_solvers(
    solver: str, tol: float | None, plan: SolverPlan | None, *, dtype: torch.dtype, shapes: Sequence[BlockShape]
) -> Solvers:
    """Returns a solver for each flow block; those of "auto" learn from the batches that go through them.

    solver: one of `SOLVERS`. tol: see `adaptive`; None is the dtype's own in `TOL`. plan: a plan of a model with such
    blocks, or None. dtype: the dtype of weights and cache. shapes: the sizes of each block. Raises ArgumentError.
    """
    check_choice("solver", solver, SOLVERS)
    if solver == "sequential":
        if tol is not None:
            raise ArgumentError("tol", "None with solver='sequential', which is exact; or another solver", tol)
        if plan is not None:
            raise ArgumentError("plan", "None with solver='sequential', which guesses nothing", "a SolverPlan")
        return Solvers([sequential] * len(shapes))
    tol = TOL[dtype] if tol is None else check_number("tol", tol, 0)
    guesses = [None if plan is None else functools.partial(plan.guess, k) for k in range(len(shapes))]
    if solver == "adaptive":
        return Solvers(functools.partial(adaptive, tol=tol, guess=guess, dtype=dtype) for guess in guesses)
    costs = CostTable()
    paces = [PassEstimate(shape.tokens, {}, {}) if plan is None else plan.pace(k) for k, shape in enumerate(shapes)]
    solvers = Solvers(Auto(tol, pace, costs, guess, dtype) for pace, guess in zip(paces, guesses, strict=True))
    solvers.costs = costs
    return solvers


__all__ = [
    "SOLVERS",
    "TOL",
    "Auto",
    "CostTable",
    "Costs",
    "PassEstimate",
    "Solution",
    "Solver",
    "SolverPlan",
    "adaptive",
    "check_plan",
    "errors",
    "make_solvers",
    "sequential",
    "widths",
]
