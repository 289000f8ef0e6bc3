"""How a flow block is inverted: strategies over one engine's passes. Nothing here knows a backend."""

from __future__ import annotations

from collections.abc import Callable

from .checks import check_choice
from .engine.contract import BlockEngine, BlockState, Progress

Solver = Callable[[BlockEngine, BlockState, Progress | None], None]


def sequential(engine: BlockEngine, state: BlockState, progress: Progress | None = None) -> None:
    """Exact, token after token: T − 1 dependent steps in the engine's fused pass."""
    engine.reverse(state, progress)


SOLVERS: dict[str, Solver] = {"sequential": sequential}


def choose_solver(solver: str) -> str:
    """The name of the solver that serves this request: "auto" is the best there is for every block."""
    check_choice("solver", solver, ("auto", *SOLVERS))
    return "sequential" if solver == "auto" else solver
