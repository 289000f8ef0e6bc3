"""IAF: x_i = μ_i(z_<i) + σ_i(z_<i) · z_i, whose samples are one pass (Kingma et al., arXiv 1606.04934)."""

from __future__ import annotations

from torch import nn

from .maf import MAF


class IAF(MAF):
    """Inverse autoregressive flow: samples in one pass, and a density value by value, which `accelerate` makes fast.

    It is MAF with data and latents exchanged. Training by maximum likelihood asks for the density of data, the slow
    direction, so that this family is for few dimensions.
    """

    def make(self, dims: int, classes: int) -> nn.Module:
        made: nn.Module = super().make(dims, classes).inv
        return made
