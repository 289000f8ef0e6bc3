"""The exact solver, which makes one token after the other."""

from __future__ import annotations

from ..engine.contract import BlockEngine, BlockState, Progress
from .solution import Solution


def sequential(engine: BlockEngine, state: BlockState, progress: Progress | None = None) -> Solution:
    """Invert a flow block by T − 1 dependent steps, in the engine's fused pass."""
    engine.reverse(state, progress)
    B, T, _ = state.x.shape
    return Solution(T - 1, B * (T - 1), T - 1, state.x.new_zeros(B), 1)
