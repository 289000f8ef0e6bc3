"""The adaptive solver: parallel passes over the tokens ahead, as few as the block allows; see `frontier.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..engine.contract import BlockEngine, BlockState, Progress
from .frontier import Frontier
from .solution import Solution

GROWTH = 300  # errors beyond so many times tol make the passes go on with a smaller one
LEAST = 4  # units of rounding, as with a smaller tol tokens go on moving by rounding alone


def least_tol(dtype: torch.dtype) -> float:
    """Returns the smallest tolerance that is of use with weights and cache of this dtype."""
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
    """Invert a flow block by parallel passes.

    Where the passes show that tol makes errors of more than `GROWTH` · tol, they go on from what they found with the
    tolerance `least`, and then with 0.

    engine, state: the engine, and a state that its `begin` gave. progress: called with the number of tokens that the
    slowest sample has gained. tol: how far a token may still move when it is taken as final, in units of the images,
    which are in [-1, 1]; 0 gives the sequential result up to rounding. guess: a function of the latents (B, T, D) that
    returns where the passes start; default the latents themselves. window: the most tokens of each sample in a pass;
    default all from its frontier on. most: the number of passes after which the rest is left to the engine's sequential
    pass; default as many as it takes. dtype: the dtype of weights and cache, by default that of the state's tokens.
    least: default `least_tol` of dtype.
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
        large = (errors > GROWTH * tol).tolist()  # a NaN, of a sample that failed, is not larger
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
