"""One parallel pass over the tokens ahead of each sample's frontier, and what it makes final.

A block's inverse is a triangular fixed-point problem: x_i = z_i · exp(xa_{i−1}) + xb_{i−1}, with parameters that depend
on the tokens before i. A pass evaluates them for a window of tokens from the *frontier* on, from guesses for those
tokens. Then, for each sample:

- the frontier's own token is final, whatever was guessed: all tokens before it are;
- if a token at the frontier moved by no more than `tol`, or than rounding moves one of its size where that is more,
  what was guessed for it is kept. Its keys and values, which
  this pass has computed, are then the right ones, so the token after it has been computed from final tokens too, and
  the frontier goes on to that one, and so forth;
- the first token that moved by more is given its new value and is final as well, but the tokens after it have been
  computed from its old one: they are the guesses of the next pass.

So every pass gains at least one token: T − 1 passes are the worst case, with the sequential result. Of every token that
was kept, |forward(x) − z| has been computed in the pass that kept it; that of the others is 0 up to rounding.

A guess may overflow. Nothing is clamped: engines see to it that a token that is infinite or NaN does not reach the
tokens before it, and here such a guess is replaced by the one that it started from, so that it spoils the guesses after
it for one pass at most. A sample whose *final* token is not finite has failed; its later tokens become NaN, and it no
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
    """How far the samples of a batch are.

    tol: how far a token may still move when it is kept; 0 for not at all. guess: (B, T, D), where the passes start;
    default the tokens as they stand in the state. start: the first token that is not final, >= 1; keys and values of
    those before start − 1 must be in the cache.

    reached: the first token of each sample that is not final, T if none is left. evaluations: tokens that passes have
    evaluated, of all samples. residual: (B,), the largest |forward(x) − z| of the tokens that were kept. trail: what
    the passes showed.
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
        """Begins again with these samples, from the tokens as they are."""
        self.trail.tol = tol
        self.reached = [1 if again else done for again, done in zip(samples, self.reached, strict=True)]
        self.residual.masked_fill_(torch.tensor(samples, device=self.residual.device), 0)
        self._guess = torch.where(torch.isfinite(self.state.x), self.state.x, 0)
        self.trail.forget_passes()

    @property
    def slowest(self) -> int:
        return min(self.reached)

    def run(self, window: int, most: int | None = None, progress: Progress | None = None) -> int:
        """Passes over so many tokens of each sample at most, until all are done, or `most` of them. Returns how many.

        progress(n): the slowest sample has n more tokens. An engine that can makes the passes by itself.
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
        done = engine.iterate_on_device(
            self.state, self._guess, self.reached, self.trail, window=window, max_passes=most
        )
        self.reached = done.reached
        self.evaluations += done.evaluations
        self.residual = torch.maximum(self.residual, done.residual)
        return done.passes

    def advance(self, window: int) -> None:
        """A pass over so many tokens of each sample at most, with one small read from the device.

        Samples have windows of their own, and those that are done take no part. If the engine is not ragged it
        evaluates all tokens that any of them has, and what it gives for others is not used: a sample's result does not
        depend on its batch mates.
        """
        x = self.state.x
        B, T, _ = x.shape
        fronts, ends = self.reached, [min(front + window, T) for front in self.reached]
        own = self.engine.ragged or B == 1  # each sample's window is evaluated, and no more
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

        # The token that was given its new value, or the end of the window if all were kept.
        first = [min(start + n, end) for start, n, end in zip(starts, counts, ends, strict=True)]
        failed = [False] * B if finite else self._mend(first, ends)
        self.reached = [
            T if bad else max(front, min(token + 1, end))
            for front, token, end, bad in zip(fronts, first, ends, failed, strict=True)
        ]

    def _mend(self, first: list[int], ends: list[int]) -> list[bool]:
        """Put where they started the guesses after `first` that overflowed. Returns which samples failed."""
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
    """The index of x that gives each sample's window, (B, W, D), and the numbers of its tokens, (B, W) or (1, W).

    Beyond its window a sample's token 0 stands in.
    """
    start, stop = torch.tensor([starts, stops], device=device).unsqueeze(-1)
    token = start + torch.arange(max(b - a for a, b in zip(starts, stops, strict=True)), device=device)
    if min(starts) == max(starts) and min(stops) == max(stops):
        return (slice(None), slice(starts[0], stops[0])), token[:1]
    return (torch.arange(len(starts), device=device).unsqueeze(1), torch.where(token < stop, token, 0)), token
