"""What a solver is, and what it says of a block that it has solved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Solution:
    """How a block was solved, whose result is in its state.

    passes: dependent steps, each an evaluation of the transformer on one token or a window of tokens. evaluations:
    tokens evaluated, of all samples together. residual: (B,), max |forward(x) − z| of each sample, up to rounding; 0
    for an exact solver.
    """

    passes: int
    evaluations: int
    residual: Tensor


Solver = Callable[..., Solution]
"""solve(engine, state, progress), and guess= for solvers that start from one, (B, T, D) in the block's order."""
