"""The networks that give a coupling its parameters: a perceptron for vectors, convolutions for images."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Perceptron(nn.Module):
    """params = network([x, waves of x, c]), (B, outputs, *shape): fully connected layers with SiLU.

    shape: the shape of x without its batch. outputs: how many parameters each value of x gets. hidden: the widths of
    the hidden layers. classes: the width of the context c, 0 for none. octaves: how many pairs of `waves` the network
    sees of x. zeroed: whether the last layer begins at zero.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        outputs: int,
        hidden: tuple[int, ...],
        classes: int = 0,
        *,
        octaves: int = 0,
        zeroed: bool = True,
    ):
        super().__init__()
        self.shape, self.octaves = (outputs, *shape), octaves
        widths = (math.prod(shape) * (1 + 2 * octaves) + classes, *hidden, math.prod(self.shape))
        layers: list[nn.Module] = []
        for width, following in pairwise(widths):
            layers += [nn.Linear(width, following), nn.SiLU()]
        self.layers = nn.Sequential(*layers[:-1])
        if zeroed:
            zero(layers[-2])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns the parameters, (B, outputs, *shape). x: (B, *shape). context: (B, classes), or None."""
        x = x.flatten(1)
        inputs = [x, *waves(x, self.octaves), *([] if context is None else [context])]
        return self.layers(torch.cat(inputs, 1)).unflatten(1, self.shape)


class Convolutions(nn.Module):
    """params = network(x, c), (B, outputs, channels, H, W): residual blocks of 3×3 convolutions, the last one zero.

    channels: those of x. outputs: how many parameters each value of x gets. width: the channels between. blocks: the
    number of residual blocks. classes: the width of the context c, which is added to the first layer's output; 0 for
    none.
    """

    def __init__(self, channels: int, outputs: int, width: int, blocks: int, classes: int = 0):
        super().__init__()
        self.outputs = outputs
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.context = nn.Linear(classes, width, bias=False) if classes else None
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 1))
            for _ in range(blocks)
        )
        self.last = nn.Conv2d(width, outputs * channels, 3, padding=1)
        zero(self.last)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns the parameters, (B, outputs, channels, H, W). x: (B, channels, H, W). context: (B, classes)."""
        h = self.first(x)
        if self.context is not None:
            h = h + self.context(context)[:, :, None, None]
        for block in self.blocks:
            h = h + block(h)
        return self.last(F.silu(h)).unflatten(1, (self.outputs, x.shape[1]))


def waves(x: Tensor, octaves: int) -> list[Tensor]:
    """Returns sin 2ᵏx and cos 2ᵏx for k < octaves, by which a network learns sharp edges sooner. x: (B, D)."""
    return [wave(x * 2.0**k) for k in range(octaves) for wave in (torch.sin, torch.cos)]


def zero(layer: nn.Module) -> None:
    """Sets the weight and bias of a layer to zero, so that a step made of it begins as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
