"""The adaptive solver: parallel passes over the tokens ahead, as few as the block allows; see `frontier.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..engine.contract import BlockEngine, BlockState, Progress
from .frontier import Frontier
from .solution import Solution

GROWTH = 300
LEAST = 4  # units of rounding: with a smaller tol tokens go on moving by rounding alone


def least_tol(dtype: torch.dtype) -> float:
    """Of weights and cache of this dtype."""
    return LEAST * torch.finfo(dtype).eps


@torch.no_grad()
def adaptive(
    engine: BlockEngine,
    state: BlockState,
    progress: Progress | None = None,
    *,
    tol: float,
    guess: Callable[[Tensor], Tensor] | None = None,
    window: int | None = None,
    most: int | None = None,
    dtype: torch.dtype | None = None,
    least: float | None = None,
) -> Solution:
    """tol: how far a token may still move when it is taken as final, in units of the images ([-1, 1] across); 0 gives
    the sequential result up to rounding. Where the passes show that this makes errors of more than `GROWTH` · tol, they
    go on from what they found with the tol `least`, default `least_tol` of dtype, and then with 0. dtype: of weights
    and cache, by default the stream's. guess:
    where the passes start, from the latents (B, T, D); default there. window: tokens of a sample in a pass at most;
    default all from its frontier on. most: passes after which the rest is left to the engine's sequential pass; default
    as many as it takes.
    """
    B, T, _ = state.x.shape
    window = T - 1 if window is None else window
    frontier = Frontier(engine, state, tol, None if guess is None else guess(state.z), dtype=dtype)
    passes = frontier.run(window, most, progress)
    least = least_tol(dtype or state.x.dtype) if least is None else least
    shown = None
    for less in (least, 0.0):
        if tol <= least or (most is not None and passes >= most):
            break
        shown = frontier.trail.shown(state.x)
        errors = shown.errors(rounding=False).amax(1)
        large = (errors > GROWTH * tol).tolist()  # not NaN: of a sample that failed
        if not any(large):
            break
        frontier.refine(less, large)
        passes += frontier.run(window, None if most is None else most - passes)
        shown = None
    start = frontier.slowest
    if start < T:
        engine.reverse(state, progress, start)
        shown = None
    return Solution(
        passes=passes + T - start,
        evaluations=frontier.evaluations + B * (T - start),
        steps=T - start,
        residual=frontier.residual,
        window=window if passes else 1,
        shown=frontier.trail.shown(state.x) if shown is None else shown,
    )
