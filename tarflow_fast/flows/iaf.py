"""IAF: x_i = μ_i(z_<i) + σ_i(z_<i) · z_i, whose samples are one pass (Kingma et al., 2016, arXiv 1606.04934)."""

from __future__ import annotations

from .maf import MAF


class IAF(MAF):
    """Inverse autoregressive flow: samples in one pass, and a density value by value, which `accelerate` makes fast.

    It is MAF with data and latents exchanged. Training by maximum likelihood asks for the density of data, the slow
    direction, by zuko's own D passes, so that this family is for few dimensions.
    """

    inverted = True
