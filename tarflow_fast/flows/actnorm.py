"""ActNorm, the normalisation of Glow, whose first batch sets its scale and shift."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Bijection

SMALLEST_STD = 1e-3  # of a channel that is constant in the first batch


class ActNorm(Bijection):
    """z = (x + b) exp(s), with one shift b and one log-scale s for each channel, or for each value of a vector.

    The first batch in training mode sets them so that each channel of z has mean 0 and variance 1; from then on they
    are learnt. The log-det is Σ s over channels, times the number of pixels.

    shape: that of one sample, (D,) or (channels, H, W).
    """

    initialised: Tensor

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        each = (shape[0], *(1 for _ in shape[1:]))
        self.shift = nn.Parameter(torch.zeros(each))
        self.log_scale = nn.Parameter(torch.zeros(each))
        self.pixels = int(torch.Size(shape[1:]).numel())
        self.register_buffer("initialised", torch.tensor(0.0))

    @torch.no_grad()
    def _initialise(self, x: Tensor) -> None:
        """Sets shift and scale by a batch. x: (B, channels, …)."""
        axes = [axis for axis in range(x.dim()) if axis != 1]
        mean, std = x.mean(axes), x.std(axes, correction=0).clamp(min=SMALLEST_STD)
        self.shift.copy_(-mean.reshape(self.shift.shape))
        self.log_scale.copy_(-std.log().reshape(self.log_scale.shape))
        self.initialised.fill_(1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.training and not self.initialised:
            self._initialise(x)
        return (x + self.shift) * self.log_scale.exp(), (self.log_scale.sum() * self.pixels).expand(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z * (-self.log_scale).exp() - self.shift, (-self.log_scale.sum() * self.pixels).expand(len(z))
