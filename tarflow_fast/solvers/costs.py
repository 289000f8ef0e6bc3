"""The measured costs of a token of the sequential pass and of a parallel pass, in the middle of a block."""

from __future__ import annotations

import bisect
import functools
from dataclasses import dataclass, field

import torch

from ..engine.contract import BlockEngine, BlockState
from ..engine.timing import STEPS, seconds
from .frontier import Frontier
from .windows import hoped_advance


@dataclass(frozen=True)
class Costs:
    """The times that passes of an engine take for one size of batch.

    token: seconds for a token of the sequential pass. passes: seconds for a parallel pass, including all that the
    solver does beside it, by the width of its window in tokens, ascending.
    """

    token: float
    passes: dict[int, float] = field(default_factory=dict)

    def of_pass(self, width: float) -> float:
        """Returns the seconds of a pass of this width.

        They are linear between two widths that were measured, and proportional to the width beyond the last.
        """
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
    """Returns the costs of this engine for batches like this one.

    The state's tokens and log-dets are put back afterwards.

    widths: the widths of windows to measure, ascending. The widest are left out where rows fill the machine, and what a
    wider window adds takes longer than in the sequential pass even at best. A run in which the engine compiles or
    captures a graph does not count.
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
    costs = Costs(seconds(engine, lambda: tokens(steps)) / steps)
    gain = before = 0.0  # tokens that a pass gains at best, less those that the sequential pass makes in the same time
    for width in widths:
        costs.passes[width] = seconds(engine, functools.partial(one_pass, width))
        before, gain = gain, hoped_advance(width) - costs.passes[width] / costs.token
        if len(costs.passes) > 2 and gain < min(before, 0):
            break
    state.x.copy_(x)
    state.token_log_det.copy_(log_det)
    state.nonfinite = None
    return costs
