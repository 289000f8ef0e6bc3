"""Steps in a row, and the multi-scale frame in which half of the channels leave early."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ArgumentError
from .base import Bijection


class Chain(Bijection):
    """z = f_n(… f_1(x)): steps in the order in which data go through them; log-dets add up."""

    def __init__(self, steps: Iterable[Bijection]):
        super().__init__()
        self.steps = nn.ModuleList(steps)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(len(x))
        for step in self.steps:
            x, log_det = step(x, context)
            total = total + log_det
        return x, total

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = z.new_zeros(len(z))
        for step in reversed(list[Any](self.steps)):
            z, log_det = step.inverse(z, context)
            total = total + log_det
        return z, total


class Squeeze(Bijection):
    """(B, C, H, W) → (B, 4C, H/2, W/2): each 2×2 square of pixels becomes four channels; the log-det is 0."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return F.pixel_unshuffle(x, 2), x.new_zeros(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return F.pixel_shuffle(z, 2), z.new_zeros(len(z))


class Multiscale(Bijection):
    """After each scale but the last, the second half of the channels leaves as latents (Dinh et al., 2017).

    The latents of all scales, one after the other, fill a tensor of the shape of x.

    shape: (C, H, W) of x. scales: the steps of each scale, from the finest; each halves H and W, but the last, which
    may or may not. halved: whether the last one does.
    """

    def __init__(self, shape: tuple[int, int, int], scales: Iterable[Bijection], *, halved: bool = False):
        super().__init__()
        self.shape = shape
        self.scales = nn.ModuleList(scales)
        self.sizes = scale_shapes(shape, len(self.scales))  # of x where each scale begins
        self.halved = halved

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        latents, total = [], x.new_zeros(len(x))
        for scale in self.scales[:-1]:
            x, log_det = scale(x, context)
            x, leaving = x.chunk(2, dim=1)
            latents.append(leaving.flatten(1))
            total = total + log_det
        x, log_det = self.scales[-1](x, context)
        z = torch.cat([*latents, x.flatten(1)], 1)
        return z.unflatten(1, self.shape), total + log_det

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        *left, (channels, height, width) = self.sizes
        counts = [c * h * w // 2 for c, h, w in left]
        *latents, last = z.flatten(1).split([*counts, channels * height * width], 1)
        ends = (4 * channels, height // 2, width // 2) if self.halved else (channels, height, width)
        x, total = self._scale(-1).inverse(last.unflatten(1, ends), context)
        for k in reversed(range(len(left))):
            x, log_det = self._scale(k).inverse(torch.cat([x, latents[k].reshape(x.shape)], 1), context)
            total = total + log_det
        return x, total

    def _scale(self, k: int) -> Bijection:
        scale = self.scales[k]
        assert isinstance(scale, Bijection)
        return scale


def scale_shapes(shape: tuple[int, int, int], scales: int) -> list[tuple[int, int, int]]:
    """Returns (C, H, W) where each scale begins: C doubles and H and W halve from scale to scale.

    Raises ArgumentError where an image of this shape has not so many scales.
    """
    channels, height, width = shape
    most = 1
    while height % 2**most == 0 and width % 2**most == 0:
        most += 1
    if scales > most:
        raise ArgumentError("scales", f"at most {most}, as {height}×{width} pixels cannot be halved more often", scales)
    return [(channels * 2**k, height // 2**k, width // 2**k) for k in range(scales)]
