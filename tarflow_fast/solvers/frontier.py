"""One parallel pass over the tokens ahead of each sample's frontier, and what it makes final.

The inverse of a block is a triangular fixed-point problem, x_i = z_i · exp(xa_{i−1}) + xb_{i−1}, whose parameters
depend on the tokens before i. A pass evaluates them for a window of tokens from the *frontier* on, from guesses for
those tokens. Then, for each sample:

- The frontier's own token is final, whatever was guessed, because all tokens before it are.
- If the token at the frontier moved by no more than `tol`, or than rounding moves a token of its size where that is
  more, the guess for it is kept. Its keys and values, which this pass has computed, are then the right ones, so the
  token after it has been computed from final tokens too. The frontier goes on to that token, and so forth.
- The first token that moved by more gets its new value and is final as well. The tokens after it have been computed
  from its old value, so they are the guesses of the next pass.

So every pass gains at least one token: T − 1 passes are the worst case, with the sequential result. For every token
that was kept, the pass that kept it has computed |forward(x) − z|; for the others this is 0 up to rounding.

A guess may overflow, and nothing is clamped. Engines see to it that a token that is infinite or NaN does not reach the
tokens before it. Here such a guess is replaced by the one that it started from, so that it spoils the guesses after it
for one pass at most. A sample whose *final* token is not finite has failed: its later tokens become NaN, and it no
longer counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine.contract import BlockEngine, BlockState, FrontierEngine, Progress
from .trail import Trail


class Frontier:
    """The frontiers of a batch: how far each sample is.

    tol: how far a token may still move when it is kept; 0 for not at all. guess: (B, T, D), where the passes start;
    default the tokens as they stand in the state. start: the first token that is not final, >= 1; the keys and values
    of the tokens before start − 1 must be in the cache. dtype: see `Trail`.

    reached: the first token of each sample that is not final, or T if none is left. evaluations: the number of tokens
    that passes have evaluated, over all samples. residual: (B,), the largest |forward(x) − z| of the tokens that were
    kept. trail: what the passes showed.
    """

    def __init__(
        self,
        engine: BlockEngine,
        state: BlockState,
        tol: float,
        guess: Tensor | None = None,
        start: int = 1,
        dtype: torch.dtype | None = None,
    ):
        x = state.x
        B = x.shape[0]
        if guess is not None:
            x[:, start:] = guess[:, start:]
        self.engine, self.state = engine, state
        self.reached = [start] * B
        self.evaluations = 0
        self.residual = x.new_zeros(B)
        self.trail = Trail(state, dtype, tol)
        self._guess = torch.where(torch.isfinite(x), x, 0)
        x[:, start:] = self._guess[:, start:]

    def refine(self, tol: float, samples: Sequence[bool]) -> None:
        """Begin again with another tol for the samples that are marked, from their tokens as they are."""
        self.trail.tol = tol
        self.reached = [1 if again else done for again, done in zip(samples, self.reached, strict=True)]
        self.residual.masked_fill_(torch.tensor(samples, device=self.residual.device), 0)
        self._guess = torch.where(torch.isfinite(self.state.x), self.state.x, 0)
        self.trail.forget_passes()

    @property
    def slowest(self) -> int:
        """Returns the frontier that is furthest back: the first token that is not final in some sample."""
        return min(self.reached)

    def run(self, window: int, most: int | None = None, progress: Progress | None = None) -> int:
        """Make passes until all samples are done, or until there were `most`, and return how many there were.

        window: the most tokens of each sample in a pass. progress: called with the number of tokens that the slowest
        sample has gained. An engine that is a `FrontierEngine` makes the passes by itself where the window is not too
        wide for it.
        """
        T = self.state.x.shape[1]
        most = T if most is None else most
        passes = 0
        while (start := self.slowest) < T and passes < most:
            if isinstance(self.engine, FrontierEngine) and window <= self.engine.max_window(self.state):
                passes += self._converge(self.engine, window, most - passes)
            else:
                self.advance(window)
                passes += 1
            if progress is not None:
                progress(self.slowest - start)
        return passes

    def _converge(self, engine: FrontierEngine, window: int, most: int) -> int:
        """Let the engine make passes without the host, and return how many it made."""
        done = engine.iterate_on_device(
            self.state, self._guess, self.reached, self.trail, window=window, max_passes=most
        )
        self.reached = done.reached
        self.evaluations += done.evaluations
        self.residual = torch.maximum(self.residual, done.residual)
        return done.passes

    def advance(self, window: int) -> None:
        """Make a pass over at most `window` tokens of each sample, with one small read from the device.

        Each sample has a window of its own, and samples that are done take no part. An engine that is not ragged
        evaluates all tokens that any sample has in its window, and the results for other samples are not used: a
        sample's result does not depend on its batch mates.
        """
        x = self.state.x
        B, T, _ = x.shape
        fronts, ends = self.reached, [min(front + window, T) for front in self.reached]
        own = self.engine.ragged or B == 1  # the engine evaluates each sample's window, and no more
        last = max(end for front, end in zip(fronts, ends, strict=True) if front < T)
        starts, stops = (fronts, ends) if own else ([min(fronts)] * B, [last] * B)
        at, token = _tokens(starts, stops, x.device)
        before = x[at].clone()
        if self.engine.ragged and B > 1:
            moved = self.engine.fixed_point(self.state, starts, stops)
        else:
            moved = self.engine.fixed_point(self.state, starts[0], stops[0])
        self.evaluations += sum(stops) - sum(starts)

        front, end = torch.tensor([fronts, ends], device=x.device).unsqueeze(-1)
        mine, size = (token >= front) & (token < end), before.abs().amax(-1)  # (B, W)
        least = self.trail.least(size)
        still = (mine & (moved.change <= least)) | (token < front)
        still = still.cumprod(1).bool()
        x[at] = torch.where((still | ~mine).unsqueeze(-1), before, x[at])
        self.residual = torch.maximum(self.residual, torch.where(still & mine, moved.residual, 0).amax(1))
        self.trail.record(at, front, mine, still, moved, size)
        flags = torch.isfinite(moved.change).all().long().view(1)
        *counts, finite = torch.cat([still.sum(1), flags]).tolist()

        # For each sample, the token that was given its new value, or the end of the window if all were kept.
        first = [min(start + n, end) for start, n, end in zip(starts, counts, ends, strict=True)]
        failed = [False] * B if finite else self._mend(first, ends)
        self.reached = [
            T if bad else max(front, min(token + 1, end))
            for front, token, end, bad in zip(fronts, first, ends, failed, strict=True)
        ]

    def _mend(self, first: list[int], ends: list[int]) -> list[bool]:
        """Put guesses after `first` that overflowed back to where they started, and return which samples failed."""
        x = self.state.x
        T = x.shape[1]
        new, end = torch.tensor([first, ends], device=x.device).unsqueeze(-1)
        later = torch.arange(T, device=x.device) > new
        finite = torch.isfinite(x).all(-1)
        failed = (new < end) & ~finite.gather(1, new.clamp(max=T - 1))
        x.copy_(torch.where((later & ~finite).unsqueeze(-1), self._guess, x))
        x.masked_fill_((later & failed).unsqueeze(-1), torch.nan)
        failures: list[bool] = failed.squeeze(1).tolist()
        return failures


def _tokens(starts: list[int], stops: list[int], device: torch.device) -> tuple[Any, Tensor]:
    """Returns the index of x that gives each sample's window, (B, W, D), and its tokens' numbers, (B, W) or (1, W).

    Beyond the window of a sample, its token 0 stands in.
    """
    start, stop = torch.tensor([starts, stops], device=device).unsqueeze(-1)
    token = start + torch.arange(max(b - a for a, b in zip(starts, stops, strict=True)), device=device)
    if min(starts) == max(starts) and min(stops) == max(stops):
        return (slice(None), slice(starts[0], stops[0])), token[:1]
    return (torch.arange(len(starts), device=device).unsqueeze(1), torch.where(token < stop, token, 0)), token
