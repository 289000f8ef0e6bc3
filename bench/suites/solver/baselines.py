"""Published ways to invert a block in parallel, written anew from their papers, as solvers over the engine contract.

Both are fixed-point iterations of x ← F(x), F(x)_i = z_i · exp(xa_{i−1}) + xb_{i−1}, from the guess x = z. Neither
knows which tokens are final, and neither states a residual: that of a `Solution` is NaN here.
"""

from __future__ import annotations

import itertools

import torch

from tarflow_fast.engine import BlockEngine, BlockState
from tarflow_fast.engine.contract import Progress
from tarflow_fast.solvers import Solution

CLAMP = 3.0  # what GS-Jacobi holds values to, so that its guesses cannot overflow


def _ignored(tokens: int) -> None:
    """Takes the place of a progress that nobody follows."""


@torch.no_grad()
def jacobi(engine: BlockEngine, state: BlockState, progress: Progress | None = None, *, threshold: float) -> Solution:
    """Iterates x ← F(x) for all tokens at once, until no value of the whole batch moves by `threshold` or more.

    This is the stopping rule of selective Jacobi decoding (SeJD, arXiv 2505.24791), whose threshold is 0.5; in every
    block, also where SeJD would choose the sequential pass. 0 gives T − 1 passes, and so the sequential result.
    """
    B, T, _ = state.x.shape
    passes, moving = 0, True
    while moving and passes < T - 1:
        moved = engine.fixed_point(state, 1, T)
        passes += 1
        moving = not float(moved.change.max()) < threshold  # NaN moves
        (progress or _ignored)(1 if moving and passes < T - 1 else T - passes)
    return Solution(passes, B * passes * (T - 1), 0, state.x.new_full((B,), torch.nan), T - 1)


@torch.no_grad()
def gs_jacobi(
    engine: BlockEngine,
    state: BlockState,
    progress: Progress | None = None,
    *,
    segments: int,
    passes: int,
    clamp: float = CLAMP,
) -> Solution:
    """Solves windows of equal length one after the other (Gauss-Seidel), each by so many `passes` (Jacobi).

    This is GS-Jacobi of arXiv 2505.12849, where both numbers are chosen by hand for a model's blocks. A window is
    iterated no more often than it has tokens, which is exact. The first pass of a window evaluates the window before it
    again, so that what follows sees keys and values of its last iterate. clamp: values are held to ±clamp after every
    pass; a block with larger ones is then solved to another result.
    """
    B, T, _ = state.x.shape
    taken = evaluations = 0
    before = 1
    for start, stop in windows(T, segments):
        count = min(passes, stop - start)
        for number in range(count):
            first = start if number else before
            settled = state.x[:, first:start].clone()
            engine.fixed_point(state, first, stop)
            state.x[:, first:start] = settled
            state.x[:, start:stop].clamp_(-clamp, clamp)
            taken, evaluations = taken + 1, evaluations + B * (stop - first)
            (progress or _ignored)(stop - start if number == count - 1 else 0)
        before = start
    return Solution(taken, evaluations, 0, state.x.new_full((B,), torch.nan), -(-T // segments))


def windows(tokens: int, segments: int) -> list[tuple[int, int]]:
    """Returns [start, stop) of each window: 0 … tokens−1 in equal parts, or nearly; token 0 is given."""
    edges = [round(index * tokens / segments) for index in range(segments + 1)]
    return [(max(start, 1), stop) for start, stop in itertools.pairwise(edges) if max(start, 1) < stop]
