"""The steps of a flow that no network conditions: permutations, linear maps, scales, elementwise functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_choice


@dataclass(frozen=True)
class Permute:
    """The permutation z_i = x_order[i].

    Attributes:
        order: The D numbers 0 … D−1 in some order.
    """

    order: tuple[int, ...]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns z, (…, D), and log|det dz/dx|, (…)."""
        return x[..., list(self.order)], x.new_zeros(x.shape[:-1])

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x, (…, D), and log|det dx/dz|, (…)."""
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return z[..., back], z.new_zeros(z.shape[:-1])


@dataclass(frozen=True)
class Scale:
    """The map z = x · scale + shift with constants, such as ActNorm, or batch norm in eval mode.

    Attributes:
        scale: (D,).
        shift: (D,).
    """

    scale: Tensor
    shift: Tensor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns z, (…, D), and log|det dz/dx|, (…)."""
        return x * self.scale + self.shift, self.scale.abs().log().sum().expand(x.shape[:-1])

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x, (…, D), and log|det dx/dz|, (…)."""
        return (z - self.shift) / self.scale, -self.scale.abs().log().sum().expand(z.shape[:-1])


@dataclass(frozen=True)
class Linear:
    """The linear map z = W x + b, such as an LU-parametrised one, a rotation or a 1×1 convolution.

    Attributes:
        weight: (D, D), W, which can be inverted.
        bias: (D,), b, or None.
    """

    weight: Tensor
    bias: Tensor | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns z, (…, D), and log|det dz/dx|, (…)."""
        z = torch.nn.functional.linear(x, self.weight, self.bias)
        return z, torch.linalg.slogdet(self.weight).logabsdet.expand(x.shape[:-1])

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x, (…, D), and log|det dx/dz|, (…)."""
        centred = z if self.bias is None else z - self.bias
        x = torch.linalg.solve(self.weight, centred.reshape(-1, z.shape[-1]).T).T.reshape(z.shape)
        return x, -torch.linalg.slogdet(self.weight).logabsdet.expand(z.shape[:-1])


Function = Callable[[Tensor, float], Tensor]
FUNCTIONS: dict[str, tuple[Function, Function, Function]] = {
    # forward, inverse, and log dz/dx as a function of x
    "softclip": (
        lambda x, bound: x / (1 + (x / bound).abs()),
        lambda z, bound: z / (1 - (z / bound).abs()),
        lambda x, bound: -2 * torch.log1p((x / bound).abs()),
    ),
    "tanh": (
        lambda x, bound: bound * torch.tanh(x / bound),
        lambda z, bound: bound * torch.atanh(z / bound),
        lambda x, bound: 2 * (math.log(2) - x / bound - torch.nn.functional.softplus(-2 * x / bound)),
    ),
    "wrap": (
        lambda x, bound: torch.remainder(x, 2 * bound) - bound,
        lambda z, bound: torch.remainder(z, 2 * bound) - bound,
        lambda x, bound: torch.zeros_like(x),
    ),
    "exp": (lambda x, bound: x.exp(), lambda z, bound: z.log(), lambda x, bound: x),
    "sigmoid": (
        lambda x, bound: x.sigmoid(),
        lambda z, bound: z.log() - (-z).log1p(),
        lambda x, bound: -torch.nn.functional.softplus(-x) - torch.nn.functional.softplus(x),
    ),
}
"""Elementwise functions by name: z of x, x of z, and log dz/dx of x, each with the bound."""


@dataclass(frozen=True)
class Elementwise:
    """An elementwise function, z = f(x).

    Attributes:
        name: "softclip", x / (1 + |x / bound|); "tanh", bound · tanh(x / bound); "wrap", x modulo 2 bound less the
            bound, which goes half around the circle [−bound, bound); "exp"; or "sigmoid".
        bound: The bound of the first three.

    Raises:
        ArgumentError: The name is unknown.
    """

    name: str
    bound: float = 1.0

    def __post_init__(self) -> None:
        check_choice("name", self.name, tuple(FUNCTIONS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns z, (…, D), and log|det dz/dx|, (…)."""
        function, _, log_slope = FUNCTIONS[self.name]
        return function(x, self.bound), log_slope(x, self.bound).sum(-1)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x, (…, D), and log|det dx/dz|, (…)."""
        _, inverse, log_slope = FUNCTIONS[self.name]
        x = inverse(z, self.bound)
        return x, -log_slope(x, self.bound).sum(-1)


@dataclass(frozen=True)
class Reverse:
    """The inverse of a fixed step.

    Attributes:
        step: The step that is inverted.
    """

    step: Permute | Scale | Linear | Elementwise

    @staticmethod
    def of(step: Fixed) -> Fixed:
        """Returns the inverse of a step."""
        return step.step if isinstance(step, Reverse) else Reverse(step)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns z, (…, D), and log|det dz/dx|, (…)."""
        return self.step.inverse(x)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x, (…, D), and log|det dx/dz|, (…)."""
        return self.step.forward(z)


Fixed = Permute | Scale | Linear | Elementwise | Reverse
