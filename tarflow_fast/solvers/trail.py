"""What the passes over a batch showed of each token, and from it how far the tokens are from the sequential result.

A token that was kept although it would have moved by δ differs from the sequential one by that, and by what the errors
of the tokens before it do to it. With Z the error of the latents that the block was given, to first order

    E_i ≤ a_i Z_i + δ_i + s_i max_{j<i} E_j,

where a = exp(xa) and s_i is how far token i moves if tokens before it move by one at most. The passes show both: in one
of them token i moves by what the movements of the pass before, of the tokens before it, do to it. The linear law holds
only near the solution, so what is older counts less. Over the blocks of trained models and their samples, guided and
not, the error was at most 5.5 times the E that comes out; what is stated is eight times that.

A block that was solved exactly passes on the errors of its latents by the same law; there s and a are measured, by
passes from the solution moved a little.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.contract import BlockEngine, BlockState, Moved

SAFETY = 8.0  # times E, see above
NEAR = 0.5  # movements that show a sensitivity, at most, as a share of the tokens' size
FORGET = 0.9  # what a pass leaves of sensitivity and scale that earlier ones showed
MOVED, SENSITIVITY, DEFECT, SCALE = range(4)
UNSEEN = -1.0


class Trail:
    """What is kept of the passes over a batch.

    rounding: the share of a token's largest value, at least 1, by which rounding alone may move it; guidance adds that
    of w + 1 parameters and w unguided ones. values: (4, B, T) fp32, of each token, in the block's order:

    - MOVED: how far the last pass moved it; 0 if it was kept; infinite where it was put back after it overflowed;
      UNSEEN where the last pass did not evaluate it.
    - SENSITIVITY: s above; UNSEEN where no two passes in succession evaluated it.
    - DEFECT: δ above.
    - SCALE: a above.
    """

    def __init__(self, state: BlockState):
        x = state.x
        self.rounding = torch.finfo(x.dtype).eps * (1 + 2 * state.condition.guidance.scale)
        self.values = torch.empty(4, *x.shape[:2], dtype=torch.float32, device=x.device)
        self.values[MOVED], self.values[SENSITIVITY] = UNSEEN, UNSEEN
        self.values[DEFECT], self.values[SCALE] = 0, 0
        self.values[SCALE, :, 0] = 1  # the first token passes unchanged

    def noise(self, size: Tensor) -> Tensor:
        """By how much rounding alone may move tokens whose largest value is `size`."""
        return self.rounding * size.clamp(min=1)

    def forget_passes(self) -> None:
        """Other guesses have taken the place of what the last pass left."""
        self.values[MOVED] = UNSEEN

    def record(self, at: Any, front: Tensor, mine: Tensor, kept: Tensor, moves: Moved, size: Tensor) -> None:
        """Adds a pass. at: index of the tokens that it evaluated in a (B, T) tensor. front: (B, 1), the first of each
        sample's own ones. (B, W) each: mine, which are its own; kept, which of them keep what was guessed; moves;
        size, max_d |x| of what was guessed."""
        moved, sensitivity, defect, scale = (value[at] for value in self.values)
        reach = torch.where(mine, moved.clamp(min=0), 0).cummax(1).values
        reach = torch.cat([torch.zeros_like(reach[:, :1]), reach[:, :-1]], 1)  # of the tokens before
        reach = torch.maximum(reach, self.values[MOVED].gather(1, front - 1).clamp(min=0))
        change, residual = moves
        finite = torch.isfinite(change)
        largest = torch.where(mine, size, 0).clamp(min=1).cummax(1).values
        seen = mine & finite & (moved >= 0) & torch.isfinite(moved)
        seen &= (reach > self.rounding * largest) & (reach <= NEAR * largest)
        shown = (change - self.noise(size)).clamp(min=0) / reach
        scaled = mine & finite & (residual > 0) & torch.isfinite(residual)
        change = torch.where(finite, change, torch.inf)
        for which, value in (
            (MOVED, torch.where(mine, torch.where(kept, 0, change), moved)),
            (SENSITIVITY, torch.where(seen, torch.maximum(shown, FORGET * sensitivity), sensitivity)),
            (DEFECT, torch.where(mine, torch.where(kept, change, 0), defect)),
            (SCALE, torch.where(scaled, torch.maximum(change / residual, FORGET * scale), scale)),
        ):
            self.values[which][at] = value.float()

    def errors(self, latents: Tensor | None = None) -> Tensor:
        """(B, T) fp32 on the CPU: how far each token may be from the sequential result, max_d |x − x'|, up to rounding.

        latents: (B, T) of the same kind, of what the block was given; default none. A token that was never evaluated
        twice is taken to be as sensitive as its sample's are on average.
        """
        _, sensitivity, defect, scale = self.values.cpu().double().numpy()
        seen = sensitivity >= 0
        usual = (sensitivity * seen).sum(1, keepdims=True) / np.maximum(seen.sum(1, keepdims=True), 1)
        sensitivity = np.where(seen, sensitivity, np.where(seen.any(1, keepdims=True), usual, 1))
        error = SAFETY * defect
        if latents is not None:
            error = error + scale * latents.double().numpy()
        before = np.zeros(len(error))
        for i in range(error.shape[1]):
            error[:, i] += sensitivity[:, i] * before
            before = np.maximum(before, error[:, i])  # NaN of a sample that failed stays NaN
        return torch.from_numpy(error).float()


PROBES = 2
PROBE = 1e-3  # how far a probe moves tokens, times their size


def probe(engine: BlockEngine, state: BlockState) -> Trail:
    """The trail of a block that is solved: without defects. The state's x and token_log_det stay as they are."""
    x, log_det = state.x.clone(), state.token_log_det.clone()
    T = x.shape[1]
    trail, generator = Trail(state), torch.Generator("cpu").manual_seed(0)
    for _ in range(PROBES if T > 1 else 0):
        step = PROBE * x.abs().amax(-1, keepdim=True).clamp(min=1)
        signs = 2 * torch.randint(2, x.shape, generator=generator, device="cpu") - 1
        state.x += step * signs.to(x.device, x.dtype)
        change, residual = engine.fixed_point(state, 1, T)
        reach = step.squeeze(-1).cummax(1).values[:, :-1]
        moved = (state.x - x).abs().amax(-1)[:, 1:]
        sensitivity, scale = trail.values[SENSITIVITY, :, 1:], trail.values[SCALE, :, 1:]
        torch.maximum(sensitivity, SAFETY * moved / reach, out=sensitivity)
        torch.maximum(scale, change / residual, out=scale)
        state.x.copy_(x)
        state.token_log_det.copy_(log_det)
    return trail


def errors(engine: BlockEngine, state: BlockState, trail: Trail | None, latents: Tensor | None) -> Tensor | None:
    """`Trail.errors` of a block that was solved, with a trail or exactly. None: there are none."""
    if trail is None:
        if latents is None:
            return None
        trail = probe(engine, state)
    return trail.errors(latents)
