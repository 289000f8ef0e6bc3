"""What the passes over a batch showed of each token, and from it how far the tokens are from the sequential result.

A token that was kept although it would have moved by δ differs from the sequential one by that, by what rounding moves
it when it is evaluated beside others instead of alone, and by what the errors of the tokens before it do to it. With Z
the error of the latents that the block was given, and ε the unit of rounding of weights and cache and that of the
stream together, to first order

    E_i ≤ a_i Z_i + δ_i + ε |x_i| + s_i max_{j<i} E_j,

where a = exp(xa) and s_i is how far token i moves if tokens before it move by one at most. The passes show both: in one
of them token i moves by what the movements of the pass before, of the tokens before it, do to it. The linear law holds
only near the solution, so what is older counts less, and movements that rounding alone may make, or that are as large
as the tokens, show nothing. Over the blocks of trained models and their samples, guided and not, the error that δ makes
was at most 5.5 times the E that comes out of it; what is stated is eight times that δ.

The law says nothing of errors as large as the tokens: those are said to be infinite, unknown. In bf16 with guidance
that is so of most images, of which rounding alone may make others. Rounding's part is an estimate like the rest:
evaluations that round in the same way as the sequential ones, as those of the `cpu` backend, leave none of it.

A block that was solved exactly passes on the errors of its latents by the same law, and adds none of its own: its
evaluations are the sequential ones. There s and a are measured, by passes from the solution moved a little.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.contract import BlockEngine, BlockState, Moved

SAFETY = 8.0  # times δ, see above
NEAR = 0.5  # movements that the linear law holds for, at most, as a share of the tokens' size
LARGE = 4.0  # values beyond those of images and of most latents
FORGET = 0.9  # what a pass leaves of sensitivity and scale that earlier ones showed
Floats = np.ndarray[Any, np.dtype[np.float64]]
MOVED, SENSITIVITY, DEFECT, SCALE = range(4)
UNSEEN = -1.0


class Trail:
    """What is kept of the passes over a batch. It is what `FrontierEngine.iterate_on_device` is given of a solver.

    tol: how far a token may move and still keep what was guessed. rounding, stream: the share of a token's largest
    value, at least 1, by which rounding of weights and cache (of `dtype`, by default the stream's), and of the residual
    stream, may move it; guidance adds that of w + 1 parameters and w unguided ones. values: (4, B, T) fp32, of each
    token, in the block's order:

    - MOVED: how far the last pass moved it; 0 if it was kept; infinite where it was put back after it overflowed;
      UNSEEN where the last pass did not evaluate it.
    - SENSITIVITY: s above; UNSEEN where no two passes in succession evaluated it.
    - DEFECT: δ above.
    - SCALE: a above; 0 where no pass moved it.
    """

    def __init__(self, state: BlockState, dtype: torch.dtype | None = None, tol: float = 0.0):
        x = state.x
        parameters = 1 + 2 * state.condition.guidance.scale
        self.tol = tol
        self.rounding = torch.finfo(dtype or x.dtype).eps * parameters
        self.stream = torch.finfo(x.dtype).eps * parameters
        self.values = torch.empty(4, *x.shape[:2], dtype=torch.float32, device=x.device)
        self.values[MOVED], self.values[SENSITIVITY] = UNSEEN, UNSEEN
        self.values[DEFECT], self.values[SCALE] = 0, 0
        self.values[SCALE, :, 0] = 1  # the first token passes unchanged

    def noise(self, size: Tensor) -> Tensor:
        """By how much rounding of weights and cache alone may move tokens whose largest value is `size`."""
        return self.rounding * size.clamp(min=1)

    def least(self, size: Tensor) -> Tensor | float:
        """How far such tokens may move and still keep what was guessed."""
        return (self.stream * size.clamp(min=1)).clamp(min=self.tol) if self.tol > 0 else 0.0

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

    def shown(self, x: Tensor) -> Shown:
        """What the passes have shown so far, of the tokens (B, T, D): the one read from the device."""
        size = x.abs().amax(-1).clamp(min=1).float()
        _, sensitivity, defect, scale, largest = torch.cat([self.values, size.unsqueeze(0)]).cpu().double().numpy()
        return Shown(sensitivity, defect, scale, largest, (self.rounding + self.stream) * largest)


@dataclass(frozen=True)
class Shown:
    """A trail on the host, (B, T) each. size: the largest value of a token, at least 1. rounding: what an evaluation
    beside other tokens instead of alone may move it by."""

    sensitivity: Floats
    defect: Floats
    scale: Floats
    size: Floats
    rounding: Floats

    def errors(self, latents: Tensor | None = None, rounding: bool = True) -> Tensor:
        """(B, T) fp32 on the CPU: how far each token may be from the sequential result, max_d |x − x′|; infinite where
        that is unknown.

        latents: (B, T) of the same kind, of what the block was given; default none. rounding: whether these evaluations
        round otherwise than the sequential ones. A token whose sensitivity was not shown is taken to be as sensitive as
        its sample's are on average, and to pass on no less than it is given. Where tokens outgrow all before them
        beyond LARGE, errors grow at least as they do.
        """
        seen = self.sensitivity >= 0
        usual = (self.sensitivity * seen).sum(1, keepdims=True) / np.maximum(seen.sum(1, keepdims=True), 1)
        sensitivity = np.where(seen, self.sensitivity, np.maximum(usual, 1))
        error = SAFETY * self.defect
        if rounding:
            error[:, 1:] += self.rounding[:, 1:]
        if latents is not None:
            scale = np.where(self.scale > 0, self.scale, self.scale.max(1, keepdims=True))
            error += scale * latents.double().numpy()
        largest = np.maximum.accumulate(self.size, 1)
        beyond = np.maximum(largest, LARGE)
        before = np.zeros(len(error))
        with np.errstate(invalid="ignore", over="ignore"):  # of a sample that failed, which stays NaN
            for i in range(1, error.shape[1]):
                before = np.maximum(before, error[:, i - 1])
                growth = beyond[:, i] / beyond[:, i - 1]
                passed = np.where(growth > 1, np.maximum(sensitivity[:, i], growth), sensitivity[:, i]) * before
                error[:, i] += np.where(before > NEAR * largest[:, i - 1], np.inf, passed)
        return torch.from_numpy(error).float()


PROBES = 2
PROBE = 1e-3  # how far a probe moves tokens, times their size, or as far as rounding does


def probe(engine: BlockEngine, state: BlockState, dtype: torch.dtype | None = None) -> Trail:
    """The trail of a block that is solved: without defects. The state's x and token_log_det stay as they are."""
    x, log_det = state.x.clone(), state.token_log_det.clone()
    T = x.shape[1]
    trail, generator = Trail(state, dtype), torch.Generator("cpu").manual_seed(0)
    for _ in range(PROBES if T > 1 else 0):
        step = max(PROBE, trail.rounding) * x.abs().amax(-1, keepdim=True).clamp(min=1)
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


def errors(
    engine: BlockEngine,
    state: BlockState,
    shown: Shown | None,
    latents: Tensor | None,
    dtype: torch.dtype | None = None,
) -> Tensor | None:
    """`Shown.errors` of a block that was solved, by passes or exactly. None: there are none. dtype: see `Trail`."""
    if shown is not None:
        return shown.errors(latents)
    if latents is None:
        return None
    return probe(engine, state, dtype).shown(state.x).errors(latents, rounding=False)
