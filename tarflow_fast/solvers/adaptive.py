"""The adaptive solver: parallel passes over the tokens ahead, as few as the block allows.

A block's inverse is a triangular fixed-point problem: x_i = z_i · exp(xa_{i−1}) + xb_{i−1}, with parameters that depend
on the tokens before i. A pass evaluates them for all tokens from the *frontier* on, from guesses for those tokens.
Then, for each sample:

- the frontier's own token is final, whatever was guessed: all tokens before it are;
- if a token at the frontier moved by no more than `tol`, what was guessed for it is kept. Its keys and values, which
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

import torch
from torch import Tensor

from ..engine.contract import BlockEngine, BlockState, Progress
from .solution import Solution


@torch.no_grad()
def adaptive(
    engine: BlockEngine,
    state: BlockState,
    progress: Progress | None = None,
    *,
    tol: float,
    guess: Tensor | None = None,
    window: int | None = None,
) -> Solution:
    """tol: how far a token may still move when it is taken as final, in units of the images ([-1, 1] across); 0 gives
    the sequential result up to rounding. guess: (B, T, D), where the passes start; default the latents z. window:
    tokens in a pass at most; default all from the frontier on.

    One small read from the device for each pass. Samples have frontiers of their own; a pass begins at the hindmost.
    """
    x = state.x
    B, T, _ = x.shape
    if guess is not None:
        x[:, 1:] = guess[:, 1:]
    guess = torch.where(torch.isfinite(x), x, 0)
    frontier = torch.ones(B, dtype=torch.int64, device=x.device)
    residual = x.new_zeros(B)
    passes = evaluations = 0
    start = 1
    while start < T:
        stop = T if window is None else min(start + window, T)
        before = x[:, start:stop].clone()
        given = _start_afresh(before, guess[:, start:stop])
        x[:, start:stop] = given
        moved = engine.fixed_point(state, start, stop)
        passes, evaluations = passes + 1, evaluations + B * (stop - start)

        final = torch.arange(start, stop, device=x.device) < frontier[:, None]  # (B, W), before this pass
        kept = (final | (moved.change <= tol)).cumprod(1).bool()
        x[:, start:stop] = torch.where(kept.unsqueeze(-1), given, x[:, start:stop])
        x[:, start:stop] = torch.where(final.unsqueeze(-1), before, x[:, start:stop])  # of failed samples, NaN
        residual = torch.maximum(residual, moved.residual.masked_fill(~kept | final, 0).amax(1))

        first = start + kept.sum(1)  # the token that was given its new value, or `stop` if all were kept
        failed = (first < stop) & ~torch.isfinite(x[torch.arange(B, device=x.device), first.clamp(max=stop - 1)]).all(1)
        frontier = torch.maximum(frontier, (first + 1).clamp(max=stop)).masked_fill(failed, T)
        reached, any_failed = torch.stack([frontier.min(), failed.any().long()]).tolist()
        if any_failed:
            later = torch.arange(T, device=x.device) > first[:, None]
            x.masked_fill_((failed[:, None] & later).unsqueeze(-1), torch.nan)
        if progress is not None:
            progress(reached - start)
        start = reached
    return Solution(passes, evaluations, residual)


def _start_afresh(tokens: Tensor, guess: Tensor) -> Tensor:
    """The tokens, and the guess where one is not finite."""
    return torch.where(torch.isfinite(tokens).all(-1, keepdim=True), tokens, guess)
