"""Glow: ActNorm, an invertible 1×1 convolution and an affine coupling, K times a scale (Kingma and Dhariwal, 2018,
arXiv 1807.03039)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checks import check_count
from .actnorm import ActNorm
from .base import Bijection, FamilyFlow
from .composition import Chain, Multiscale, Squeeze, scale_shapes
from .coupling import Coupling, half_of_channels
from .networks import Convolutions, Perceptron


class Convolution(Bijection):
    """z = W x over the channels of each pixel, W = P L (U + diag(sign · exp(s))); log-det = pixels · Σ s.

    P is a permutation that stays as it is, L is lower triangular with ones on its diagonal and U is upper triangular
    without one. At first W is a random rotation. The inverse solves two triangular systems, so that no matrix is
    inverted.

    shape: that of one sample, (D,) or (channels, H, W).
    """

    permutation: Tensor
    sign: Tensor

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(shape[0], shape[0]))[0]
        P, L, U = torch.linalg.lu(rotation)
        self.pixels = int(torch.Size(shape[1:]).numel())
        self.register_buffer("permutation", P)
        self.register_buffer("sign", U.diagonal().sign())
        self.lower = nn.Parameter(L.tril(-1))
        self.upper = nn.Parameter(U.triu(1))
        self.log_scale = nn.Parameter(U.diagonal().abs().log())

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Returns L and the whole of U, (C, C) each."""
        L = self.lower.tril(-1) + torch.eye(len(self.sign), device=self.sign.device, dtype=self.sign.dtype)
        return L, self.upper.triu(1) + (self.sign * self.log_scale.exp()).diag()

    def _log_det(self, rows: int) -> Tensor:
        return (self.log_scale.sum() * self.pixels).expand(rows)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        L, U = self._factors()
        channels = x.movedim(1, 0)  # (C, B, …)
        z = (self.permutation @ L @ U) @ channels.flatten(1)
        return z.reshape(channels.shape).movedim(0, 1), self._log_det(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        L, U = self._factors()
        channels = z.movedim(1, 0)
        x = torch.linalg.solve_triangular(L, self.permutation.T @ channels.flatten(1), upper=False, unitriangular=True)
        x = torch.linalg.solve_triangular(U, x, upper=True)
        return x.reshape(channels.shape).movedim(0, 1), -self._log_det(len(z))


class Glow(FamilyFlow):
    """z = f_n(… f_1(x)), each f an ActNorm, an invertible linear map of the channels and an affine coupling.

    An image is squeezed before each scale, after which half of the channels leave; the last scale squeezes it where its
    sides are even. The values of a vector are its channels, and all steps follow one another.
    """

    @dataclass(frozen=True)
    class Options:
        """The options of Glow.

        Attributes:
            steps: For vectors, the number of steps.
            hidden: For vectors, the widths of the hidden layers of each coupling's network.
            scales: For images, the number of scales.
            depth: For images, the number of steps in each scale.
            width: For images, the channels of each coupling's network.
            blocks: For images, the residual blocks of each coupling's network.
        """

        steps: int = 12
        hidden: tuple[int, ...] = (64, 64)
        scales: int = 3
        depth: int = 6
        width: int = 32
        blocks: int = 1

        def __post_init__(self) -> None:
            for name in ("steps", "scales", "depth", "width"):
                check_count(name, getattr(self, name))
            check_count("blocks", self.blocks, low=0)

    for_vectors = ("steps", "hidden")
    for_images = ("scales", "depth", "width", "blocks")

    def __init__(self, data_shape: tuple[int, ...], num_classes: int = 0, options: Options | None = None):
        super().__init__(data_shape, num_classes, options)
        if len(self.data_shape) == 3:
            channels, height, width = self.data_shape
            self.bijection = self._scales((channels, height, width))
        else:
            self.bijection = Chain(self._steps(self.data_shape, self.options.steps))

    def _scales(self, shape: tuple[int, int, int]) -> Bijection:
        sizes = scale_shapes(shape, self.options.scales)
        halved = all(side % 2 == 0 for side in sizes[-1][1:])
        scales = []
        for k, (channels, height, width) in enumerate(sizes):
            squeezed = (4 * channels, height // 2, width // 2)
            if k + 1 < len(sizes) or halved:
                scales.append(Chain([Squeeze(), *self._steps(squeezed, self.options.depth)]))
            else:
                scales.append(Chain(self._steps((channels, height, width), self.options.depth)))
        return Multiscale(shape, scales, halved=halved)

    def _steps(self, shape: tuple[int, ...], count: int) -> list[Bijection]:
        steps: list[Bijection] = []
        for _ in range(count):
            steps += [ActNorm(shape), Convolution(shape), self._coupling(shape)]
        return steps

    def _coupling(self, shape: tuple[int, ...]) -> Coupling:
        if len(shape) == 3:
            channels, height, width = shape
            network = Convolutions(channels, 2, self.options.width, self.options.blocks, self.num_classes)
            return Coupling(half_of_channels((channels, height, width)), network)
        mask = half_of_channels((shape[0], 1, 1)).reshape(shape)
        return Coupling(mask, Perceptron(shape, 2, self.options.hidden, self.num_classes))
