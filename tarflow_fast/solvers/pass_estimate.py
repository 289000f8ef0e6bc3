"""The estimate of how many passes a flow block takes, and so of the window that is the quickest for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .costs import Costs
from .windows import hoped_advance, widths

WORTH = 0.95  # share of the sequential pass's time; where passes take more, the exact result is preferred
KEEP = 0.5  # weight in the moving average of what was learnt before


@dataclass
class PassEstimate:
    """The passes that one block takes, learnt from the batches that went through it.

    tokens: T. passes: the passes that the whole block takes, by window. evaluations: the evaluations of one sample in
    the whole block, by window.
    """

    tokens: int
    passes: dict[int, float]
    evaluations: dict[int, float]

    def learn(self, window: int, passes: float, evaluations: float) -> None:
        """Add to the averages what a batch took with this window."""
        for known, value in ((self.passes, passes), (self.evaluations, evaluations)):
            known[window] = KEEP * known[window] + (1 - KEEP) * value if window in known else value

    def choose(self, costs: Costs) -> int | None:
        """Returns the window that is expected to take the least time, or None for the sequential pass.

        A window that was not tried is taken to be as quick as it may be at best, so that it is tried if it may be the
        quickest.
        """
        best, least = None, WORTH * costs.token * (self.tokens - 1)
        for window in widths(self.tokens):
            seconds = self.seconds(window, costs)
            if seconds < least:
                best, least = window, seconds
        return best

    def seconds(self, window: int, costs: Costs) -> float:
        """Returns the seconds that the whole block is expected to take, at best if the window was not tried."""
        passes, evaluations = self.passes.get(window), self.evaluations.get(window)
        if passes is None or evaluations is None:
            wider = (known for other, known in self.passes.items() if other > window)  # which takes no more
            passes = max((self.tokens - 1) / hoped_advance(window), *wider, 0)
            evaluations = passes * window * (1 - window / (2 * (self.tokens - 1)))  # windows shrink towards the end
        return passes * costs.of_pass(evaluations / passes)

    def most(self, window: int, costs: Costs) -> int:
        """Returns the passes after which this window is no quicker than the sequential pass."""
        return max(math.ceil(costs.token * (self.tokens - 1) / costs.of_pass(window)), 1)
