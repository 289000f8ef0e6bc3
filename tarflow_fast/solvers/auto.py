"""The solver that looks for the quickest way through each block: the sequential pass, or parallel passes in windows.

The cost of a pass is measured for each size of batch. The number of passes that a block takes is learnt from the
batches that go through it (`pass_estimate.py`). A window that may be the quickest is tried. If it turns out to be
slower than the sequential pass, it is given up once as much time was spent on it, and the rest is left to the
sequential pass. That batch then takes up to twice as long, and those after it do not.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..engine.contract import BlockEngine, BlockState, Progress
from .adaptive import adaptive
from .costs import Costs, measure
from .pass_estimate import PassEstimate
from .sequential import sequential
from .solution import Solution, Solver
from .windows import widths


class CostTable:
    """The costs of one device's engines for blocks of one shape, by the size of a batch.

    seconds: the time spent on measuring them, beside what the engine counts as its own setup.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._costs: dict[tuple[int, bool], Costs] = {}

    def of(self, engine: BlockEngine, state: BlockState) -> Costs:
        """Returns the costs for batches like this one, which are measured when such a batch first comes."""
        size = (state.x.shape[0], state.condition.guidance.active)
        if size not in self._costs:
            started, setup = time.perf_counter(), engine.setup_seconds
            self._costs[size] = measure(engine, state, widths(state.x.shape[1]))
            self.seconds += time.perf_counter() - started - (engine.setup_seconds - setup)
        return self._costs[size]

    def known(self, batch: int, guided: bool) -> Costs | None:
        """Returns the costs for batches of this size, or None if they have not been measured."""
        return self._costs.get((batch, guided))


class Auto:
    """The solver of one block, which chooses a window by what it has learnt.

    tol, dtype: see `adaptive`. pace: how many passes this block takes, learnt from each batch. costs: the table that
    the blocks of a model share. guess: a function of the latents that returns where the passes start; default the
    latents.
    """

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
        """Invert the block in the way that is expected to take the least time."""
        B, T, _ = state.x.shape
        if T < 3:  # there is one step at most
            return sequential(engine, state, progress)
        costs = self.costs.of(engine, state)
        window = self.pace.choose(costs)
        if window is None:
            return sequential(engine, state, progress)
        most = self.pace.most(window, costs)
        solution = adaptive(
            engine, state, progress, tol=self.tol, guess=self.guess, window=window, most=most, dtype=self.dtype
        )
        whole = (T - 1) / (T - 1 - solution.steps)  # a window that was given up is extrapolated to the whole block
        passes, evaluations = solution.passes - solution.steps, solution.evaluations / B - solution.steps
        self.pace.learn(window, whole * passes, whole * evaluations)
        return solution

    def window(self, batch: int, guided: bool) -> int | None:
        """Returns the window that is taken to be the quickest for batches of this size, by what is known so far; None
        for the sequential pass."""
        costs = self.costs.known(batch, guided)
        return None if costs is None else self.pace.choose(costs)

    def fixed(self, window: int | None) -> Solver:
        """Returns the solver that always takes this window, so that its results do not depend on times."""
        if window is None:
            return sequential
        return functools.partial(adaptive, tol=self.tol, guess=self.guess, window=window, dtype=self.dtype)
