"""What a token of the sequential pass and a parallel pass cost on an engine: measured, in the middle of a block."""

from __future__ import annotations

import bisect
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..engine.contract import BlockEngine, BlockState
from .frontier import Frontier
from .windows import hoped_advance

STEPS = 8  # tokens of the sequential pass that are timed together: as many as engines put into one CUDA graph
RUNS, SECONDS = (2, 7), 0.01  # least and most; beyond the least no more than take so long


@dataclass(frozen=True)
class Costs:
    """In seconds. token: of a token in the sequential pass. passes: of a parallel pass with everything that the solver
    does beside it, by its width in tokens of each sample, ascending."""

    token: float
    passes: dict[int, float] = field(default_factory=dict)

    def of_pass(self, width: float) -> float:
        """Linear between two widths that were measured; beyond the last one in proportion."""
        widths = list(self.passes)
        i = bisect.bisect_left(widths, width)
        if i == len(widths):
            return self.passes[widths[-1]] * width / widths[-1]
        high = widths[i]
        low = widths[i - 1] if i else high
        share = (width - low) / (high - low) if high > low else 1.0
        return (1 - share) * self.passes[low] + share * self.passes[high]


@torch.no_grad()
def measure(engine: BlockEngine, state: BlockState, widths: list[int]) -> Costs:
    """Of this engine, for batches like this one, whose tokens and log-dets are put back.

    widths: ascending. Where rows fill the machine, and what a wider window adds takes longer than in the sequential
    pass even at best, those that are wider still are left out. Runs in which the engine compiles, or captures a graph,
    do not count.
    """
    x, log_det = state.x.clone(), state.token_log_det.clone()
    T = x.shape[1]
    middle = T // 2

    def tokens(count: int) -> None:
        engine.reverse(state, None, middle, middle + count)
        state.x[:, middle, 0].sum().item()  # waits for the device

    def one_pass(width: int) -> None:
        Frontier(engine, state, 0.0, start=min(middle, T - width)).run(width, most=1)

    steps = min(STEPS, T - middle)
    costs = Costs(_seconds(engine, lambda: tokens(steps)) / steps)
    gain = before = 0.0  # tokens that a pass gains at best, less those that the sequential pass makes in its time
    for width in widths:
        costs.passes[width] = _seconds(engine, functools.partial(one_pass, width))
        before, gain = gain, hoped_advance(width) - costs.passes[width] / costs.token
        if len(costs.passes) > 2 and gain < min(before, 0):
            break
    state.x.copy_(x)
    state.token_log_det.copy_(log_det)
    state.nonfinite = None
    return costs


def _seconds(engine: BlockEngine, run: Callable[[], None]) -> float:
    """Of a run that waits for the device: the least of some."""
    taken: list[float] = []
    while len(taken) < RUNS[0] or (len(taken) < RUNS[1] and sum(taken) < SECONDS):
        setup, started = engine.setup_seconds, time.perf_counter()
        run()
        if engine.setup_seconds == setup:
            taken.append(time.perf_counter() - started)
    return min(taken)
