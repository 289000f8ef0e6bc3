"""The solver that looks for the quickest way through each block: the sequential pass, or parallel passes in windows.

What a pass costs is measured for each size of batch; how many passes a block takes is learnt from the batches that go
through it (`pass_estimate.py`). A window that may be the quickest is tried. One that turns out to be slower than the
sequential pass is given up when as much time was spent on it, and the rest is left to the sequential pass: that batch
then takes up to twice as long, and those after it do not.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..engine.contract import BlockEngine, BlockState, Progress
from .adaptive import adaptive
from .costs import Costs, measure
from .pass_estimate import PassEstimate
from .sequential import sequential
from .solution import Solution
from .windows import widths


class CostTable:
    """Costs by the size of a batch, of one device's engines for blocks of one shape.

    seconds: spent on measuring them, beside what the engine counts as its own setup.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._costs: dict[tuple[int, bool], Costs] = {}

    def of(self, engine: BlockEngine, state: BlockState) -> Costs:
        size = (state.x.shape[0], state.condition.guidance.active)
        if size not in self._costs:
            started, setup = time.perf_counter(), engine.setup_seconds
            self._costs[size] = measure(engine, state, widths(state.x.shape[1]))
            self.seconds += time.perf_counter() - started - (engine.setup_seconds - setup)
        return self._costs[size]


class Auto:
    """The solver of one block. costs: shared by the blocks of a model. pace: of this block, and learns. guess: where
    the passes start, from z; default at z. tol, dtype: see `adaptive`."""

    def __init__(
        self,
        tol: float,
        pace: PassEstimate,
        costs: CostTable,
        guess: Callable[[Tensor], Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.tol, self.pace, self.costs, self.guess, self.dtype = tol, pace, costs, guess, dtype

    def __call__(self, engine: BlockEngine, state: BlockState, progress: Progress | None = None) -> Solution:
        B, T, _ = state.x.shape
        if T < 3:  # one step at most
            return sequential(engine, state, progress)
        costs = self.costs.of(engine, state)
        window = self.pace.choose(costs)
        if window is None:
            return sequential(engine, state, progress)
        most = self.pace.most(window, costs)
        solution = adaptive(
            engine, state, progress, tol=self.tol, guess=self.guess, window=window, most=most, dtype=self.dtype
        )
        whole = (T - 1) / (T - 1 - solution.steps)  # if it was given up: what the block would take at that rate
        passes, evaluations = solution.passes - solution.steps, solution.evaluations / B - solution.steps
        self.pace.learn(window, whole * passes, whole * evaluations)
        return solution
