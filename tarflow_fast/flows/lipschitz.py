"""Networks that are contractions: |g(x) − g(x')| ≤ L |x − x'| with a stated L < 1, by bounds of norms that hold."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SQUARINGS = 6  # the bound of an n×n matrix is then at most n^(1/128) times its norm: 3 % too large for n = 64
GRID = 12  # frequencies along each axis at which a convolution's norm is bounded
SLOPE = 1.1  # the largest slope of x · sigmoid(x) is 1.0998


def norm_bound(weight: Tensor) -> Tensor:
    """Returns an upper bound of the spectral norm of a layer, a scalar that is differentiable.

        σ(G)^(2^t) ≤ ‖G_t‖_F,   G_0 = G,   G_{t+1} = G_tᴴ G_t

    is Gram iteration (Delattre et al., 2023, arXiv 2305.16173), which unlike power iteration never gives too little. A
    convolution is a matrix at each frequency. A trigonometric polynomial of degree r is at most 1 / cos(π r / N) times
    its largest value at N points of a circle (Ehlich and Zeller, 1964), so that N² frequencies bound all of them. Zeros
    around an image lower a convolution's norm.

    weight: (outputs, inputs) of a linear layer, or (outputs, inputs, k, k) of a convolution whose k is odd.
    """
    slack = 1.0
    if weight.shape[2:] == (1, 1):
        weight = weight.flatten(1)
    if weight.dim() == 4:
        degree = weight.shape[-1] // 2
        slack = math.cos(math.pi * degree / GRID) ** -2
        weight = torch.fft.rfft2(weight, s=(GRID, GRID)).permute(2, 3, 0, 1)  # those left out are conjugates
    if weight.shape[-2] < weight.shape[-1]:
        weight = weight.mH
    log, power = weight.new_zeros(weight.shape[:-2], dtype=weight.real.dtype), 1.0
    tiny = torch.finfo(log.dtype).tiny
    for _ in range(SQUARINGS):
        size = torch.linalg.matrix_norm(weight).clamp(min=tiny)
        weight = weight / size[..., None, None]
        weight = weight.mH @ weight
        log, power = 2 * (log + size.log()), 2 * power
    log = log + torch.linalg.matrix_norm(weight).clamp(min=tiny).log()
    return slack * (log.amax() / power).exp()


class Contraction(nn.Module):
    """g(x; c) = W_n φ(… φ(W_1 x + b_1 + E c)), whose Lipschitz constant is at most L: each |W_i| ≤ L^(1/n).

    φ(x) = x · sigmoid(β x) / 1.1, LipSwish (Chen et al., 2019), has slopes of at most 1. A weight is scaled down where
    the bound of its norm asks for it. For images the W are convolutions of 3×3, 1×1 … and 3×3 pixels, on squares of
    pixels taken as channels, which is an isometry.

    shape: that of x, (D,) or (channels, H, W). hidden: the widths, or channels, between. classes: the width of the
    context c, 0 for none. lipschitz: L.
    """

    def __init__(self, shape: tuple[int, ...], hidden: tuple[int, ...], classes: int, lipschitz: float):
        super().__init__()
        self.square = 1
        if len(shape) == 3:
            self.square = math.gcd(4, *shape[1:])
        width = shape[0] * self.square**2
        widths = (width, *hidden, width)
        layers = []
        for i, (inputs, outputs) in enumerate(pairwise(widths)):
            side = 3 if i in (0, len(hidden)) else 1
            layers.append(nn.Linear(inputs, outputs) if len(shape) == 1 else nn.Conv2d(inputs, outputs, side))
            nn.init.orthogonal_(layers[-1].weight)  # a random matrix of the same norm moves most inputs far less
        self.layers = nn.ModuleList(layers)
        self.beta = nn.Parameter(torch.full((len(hidden),), 0.5))
        self.of_context = nn.Linear(classes, widths[1], bias=False) if classes else None
        self.coefficient = lipschitz ** (1 / len(layers))

    def weights(self) -> tuple[list[Tensor], Tensor]:
        """Returns the scaled weights, and the bound of the Lipschitz constant, a scalar."""
        weights, total = [], torch.ones_like(self.beta[0])
        for layer in list[Any](self.layers):
            bound = norm_bound(layer.weight)
            least = bound.clamp(max=self.coefficient)
            weights.append(layer.weight * (least / bound))
            total = total * least
        return weights, total

    def forward(self, x: Tensor, context: Tensor | None, weights: list[Tensor]) -> Tensor:
        """Returns g(x; c), of the shape of x. x: (B, *shape). context: (B, classes), or None. weights: `weights()`."""
        h = F.pixel_unshuffle(x, self.square) if self.square > 1 else x
        for i, (layer, weight) in enumerate(zip(list[Any](self.layers), weights, strict=True)):
            if weight.dim() == 2:
                h = F.linear(h, weight, layer.bias)
            else:
                h = F.conv2d(h, weight, layer.bias, padding=weight.shape[-1] // 2)
            if i == 0 and context is not None and self.of_context is not None:
                added = self.of_context(context)
                h = h + added.reshape(*added.shape, *(1 for _ in h.shape[2:]))
            if i < len(self.beta):
                h = h * torch.sigmoid(F.softplus(self.beta[i]) * h) / SLOPE
        return F.pixel_shuffle(h, self.square) if self.square > 1 else h
