"""Networks v(x, t; c) that give the velocity of an ODE: an MLP for vectors, a small U-Net for images."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ArgumentError
from .networks import waves

FREQUENCIES = 4  # of the features of time


def time_features(t: Tensor, rows: int) -> Tensor:
    """Returns (t, sin 2ᵏπt, cos 2ᵏπt for k < 4), (rows, 9). t: () or (rows,), a time in [0, 1]."""
    t = t.expand(rows).unsqueeze(1)
    angles = t * (math.pi * 2.0 ** torch.arange(FREQUENCIES, dtype=t.dtype, device=t.device))
    return torch.cat([t, angles.sin(), angles.cos()], dim=1)


TIME_FEATURES = 1 + 2 * FREQUENCIES


class VectorVelocity(nn.Module):
    """v(x, t; c) of vectors: an MLP with residual blocks, h ← h + W₂ SiLU(W₁ SiLU(h)), which is smooth in x and t.

    Its last layer begins at zero, so that the ODE begins as the identity.
    """

    def __init__(self, features: int, outputs: int, num_classes: int, width: int, blocks: int, octaves: int = 0):
        """features: the size of x. outputs: the size of v. num_classes: C. width: of h. blocks: how many there are.

        octaves: how many pairs of `waves` the network sees beside x.
        """
        super().__init__()
        self.octaves = octaves
        self.enter = nn.Linear(features * (1 + 2 * octaves) + TIME_FEATURES + num_classes, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(blocks)
        )
        self.leave = nn.Linear(width, outputs)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns v, (B, outputs).

        x: (B, features). t: () or (B,), time. context: (B, C) one-hot classes, or None where there are no classes.
        """
        given = [x, *waves(x, self.octaves), time_features(t.to(x.dtype), len(x))]
        h = self.enter(torch.cat(given if context is None else [*given, context.to(x.dtype)], dim=1))
        for block in self.blocks:
            h = h + block(h)
        return self.leave(F.silu(h))


class ImageVelocity(nn.Module):
    """v(x, t; c) of images: a U-Net on 2×2 patches with two resolutions, whose blocks are scaled by time and class.

    Its last layer begins at zero, so that the ODE begins as the identity.
    """

    def __init__(self, shape: tuple[int, ...], num_classes: int, width: int, blocks: int):
        """shape: (channels, height, width) of an image. num_classes: C. width: channels. blocks: at each resolution."""
        super().__init__()
        channels, height, breadth = shape
        if height % 4 or breadth % 4:
            raise ArgumentError("data_shape", "images whose height and width are multiples of 4", shape)
        hidden = 4 * width
        self.embed = nn.Sequential(
            nn.Linear(TIME_FEATURES + num_classes, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()
        )
        self.enter = nn.Conv2d(4 * channels, width, 3, padding=1)
        self.fine = nn.ModuleList(_Block(width, hidden) for _ in range(blocks))
        self.down = nn.Conv2d(width, 2 * width, 2, stride=2)
        self.coarse = nn.ModuleList(_Block(2 * width, hidden) for _ in range(2 * blocks))
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.merge = nn.Conv2d(2 * width, width, 1)
        self.last = nn.ModuleList(_Block(width, hidden) for _ in range(blocks))
        self.leave = nn.Conv2d(width, 4 * channels, 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns v in the shape of x, (B, channels, height, width). t, context: as in `VectorVelocity`."""
        times = time_features(t.to(x.dtype), len(x))
        e = self.embed(times if context is None else torch.cat([times, context.to(x.dtype)], dim=1))
        h = self.enter(F.pixel_unshuffle(x, 2))  # (B, width, height / 2, breadth / 2)
        for block in self.fine:
            h = block(h, e)
        low = self.down(h)
        for block in self.coarse:
            low = block(low, e)
        h = self.merge(torch.cat([h, self.up(low)], dim=1))
        for block in self.last:
            h = block(h, e)
        return F.pixel_shuffle(self.leave(F.silu(h)), 2)


class _Block(nn.Module):
    """h + conv(SiLU(norm(conv(SiLU(norm(h)))) · (1 + a) + b)), where (a, b) come from time and class."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        groups = math.gcd(8, width)
        self.norms = nn.ModuleList(nn.GroupNorm(groups, width) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.scale = nn.Linear(hidden, 2 * width)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        a, b = self.scale(e)[..., None, None].chunk(2, dim=1)
        inner = self.convs[0](F.silu(self.norms[0](h)))
        return h + self.convs[1](F.silu(self.norms[1](inner) * (1 + a) + b))


def velocity_network(shape: tuple[int, ...], num_classes: int, width: int, blocks: int, octaves: int) -> nn.Module:
    """Returns the network for data of this shape: (D,) vectors, which `octaves` are of, or (channels, H, W) images."""
    if len(shape) == 3:
        return ImageVelocity(shape, num_classes, width, blocks)
    return VectorVelocity(shape[0], shape[0], num_classes, width, blocks, octaves)
