"""Coupling layers: a part of the values passes, and gives the parameters by which the rest is changed."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..fused import affine_coupling
from .base import Bijection

LOG_SCALE_BOUND = 2.0  # one layer stretches a value by at most e²


class Coupling(Bijection):
    """z = m x + (1 − m) (x − t) exp(−s), with (t, s) = network(m x, c); an additive one has s = 0.

    The log-scale is bounded smoothly, s = 2 tanh(s'/2), so that no step of training can make it explode. The update is
    one fused pass, and so is its gradient.

    mask: m, of the shape of one sample, 1 where values pass. network: a module that gives t and s', (B, 2, *shape), or
    t alone, (B, 1, *shape), for an additive coupling.
    """

    mask: Tensor
    changes: Tensor

    def __init__(self, mask: Tensor, network: nn.Module):
        super().__init__()
        self.register_buffer("mask", mask.to(torch.get_default_dtype()), persistent=False)
        self.register_buffer("changes", 1 - self.mask, persistent=False)
        self.network = network

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._update(x, context, inverse=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._update(z, context, inverse=True)

    def _update(self, value: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
        parameters = self.network(value * self.mask, context).to(value.dtype)
        return affine_coupling(parameters, value, self.changes, bound=LOG_SCALE_BOUND, inverse=inverse)


class DiagonalScale(Bijection):
    """z = x exp(s), with one learnt log-scale s for each value; the log-det is Σ s. shape: that of one sample."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x * self.log_scale.exp(), self.log_scale.sum().expand(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z * (-self.log_scale).exp(), -self.log_scale.sum().expand(len(z))


def alternating(shape: tuple[int, ...], odd: bool = False) -> Tensor:
    """Returns the mask whose every other value, counted through the whole sample, is 1: the even ones unless odd."""
    return ((torch.arange(math.prod(shape)) + odd) % 2 == 0).to(torch.get_default_dtype()).reshape(shape)


def checkerboard(shape: tuple[int, int, int], odd: bool = False) -> Tensor:
    """Returns the mask (channels, H, W) that is 1 on the fields of one colour of a checkerboard."""
    _, height, width = shape
    fields = torch.arange(height)[:, None] + torch.arange(width)
    return ((fields + odd) % 2 == 0).to(torch.get_default_dtype()).expand(shape).contiguous()


def half_of_channels(shape: tuple[int, int, int], odd: bool = False) -> Tensor:
    """Returns the mask (channels, H, W) that is 1 on the first half of the channels, or the second if odd."""
    first = torch.arange(shape[0]) < shape[0] // 2
    return (first != odd).to(torch.get_default_dtype())[:, None, None].expand(shape).contiguous()
