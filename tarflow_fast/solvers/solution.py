"""The interface of solvers, and what a solver reports of a block that it has solved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..engine.contract import BlockEngine, BlockState, Progress
from .trail import Shown


@dataclass(frozen=True)
class Solution:
    """A report of how a block was solved.

    The result itself is in the block's state.

    passes: the number of dependent steps, each an evaluation of the transformer on one token or on a window of tokens.
    evaluations: the number of tokens that were evaluated, over all samples. steps: how many of the passes were steps of
    the engine's sequential pass. residual: (B,), max |forward(x) − z| of each sample up to rounding; it is 0 for an
    exact solver, and an upper bound where the last tokens were left to one. window: the most tokens of a sample in a
    pass, 1 for the sequential pass. shown: what parallel passes showed, or None if there were none.
    """

    passes: int
    evaluations: int
    steps: int
    residual: Tensor
    window: int
    shown: Shown | None = None


class Solver(Protocol):
    """A function that inverts a flow block.

    It takes a state that `begin` gave, and leaves the result in its x and token_log_det.
    """

    def __call__(self, engine: BlockEngine, state: BlockState, progress: Progress | None = None) -> Solution: ...
