"""What was learnt of a flow block: how many passes it takes, and by that which window is the quickest for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .costs import Costs
from .windows import hoped_advance, widths

WORTH = 0.95  # of the sequential pass's time: for less gain than this, the exact result is preferred
KEEP = 0.5  # weight of what was learnt before in the moving average


@dataclass
class PassEstimate:
    """Of one block. passes, evaluations: by window, of a whole block; evaluations are those of one sample."""

    tokens: int
    passes: dict[int, float]
    evaluations: dict[int, float]

    def learn(self, window: int, passes: float, evaluations: float) -> None:
        """What a batch took."""
        for known, value in ((self.passes, passes), (self.evaluations, evaluations)):
            known[window] = KEEP * known[window] + (1 - KEEP) * value if window in known else value

    def choose(self, costs: Costs) -> int | None:
        """The window that is expected to take the least time, or None for the sequential pass.

        Of a window that was not tried the best is hoped for, so that it is tried if it may be the quickest.
        """
        best, least = None, WORTH * costs.token * (self.tokens - 1)
        for window in widths(self.tokens):
            seconds = self.seconds(window, costs)
            if seconds < least:
                best, least = window, seconds
        return best

    def seconds(self, window: int, costs: Costs) -> float:
        """Expected of a whole block; hoped for, if the window was not tried."""
        passes, evaluations = self.passes.get(window), self.evaluations.get(window)
        if passes is None or evaluations is None:
            wider = (known for other, known in self.passes.items() if other > window)  # which takes no more passes
            passes = max((self.tokens - 1) / hoped_advance(window), *wider, 0)
            evaluations = passes * window * (1 - window / (2 * (self.tokens - 1)))  # windows shrink towards the end
        return passes * costs.of_pass(evaluations / passes)

    def most(self, window: int, costs: Costs) -> int:
        """Passes in which a window must be through the block, not to be slower than the sequential pass."""
        return max(math.ceil(costs.token * (self.tokens - 1) / costs.of_pass(window)), 1)
