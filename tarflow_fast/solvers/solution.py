"""What a solver is, and what it says of a block that it has solved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..engine.contract import BlockEngine, BlockState, Progress
from .trail import Shown


@dataclass(frozen=True)
class Solution:
    """How a block was solved, whose result is in its state.

    passes: dependent steps, each an evaluation of the transformer on one token or a window of tokens. evaluations:
    tokens evaluated, of all samples together. steps: of the passes, those of the engine's sequential pass. residual:
    (B,), max |forward(x) − z| of each sample, up to rounding; 0 for an exact solver, and at most this where the last
    tokens were left to one. window: tokens of a sample in a pass; 1 for the sequential pass. shown: what the
    passes showed, if there were any.
    """

    passes: int
    evaluations: int
    steps: int
    residual: Tensor
    window: int
    shown: Shown | None = None


class Solver(Protocol):
    """Inverts a flow block: from a state that `begin` gave to one whose x and token_log_det are the result."""

    def __call__(self, engine: BlockEngine, state: BlockState, progress: Progress | None = None) -> Solution: ...
