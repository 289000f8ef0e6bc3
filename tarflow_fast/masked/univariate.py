"""The univariate transforms of masked autoregressive flows: z_i = f(x_i; φ_i), increasing in x_i.

The network's outputs are raw parameters, which each library maps to a transform by a law of its own. A law is part of
the description, so that engines take raw parameters and no library has to rescale its weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import check_choice, check_number
from ..errors import ArgumentError
from ..spline import SplineLaw, spline

AFFINE_LAWS = ("softclip", "softplus", "sigmoid", "exp")


@dataclass(frozen=True)
class Affine:
    """The affine transform z = x · scale + shift, with log dz/dx = log scale.

    The scale comes from its raw parameter a by one of these laws:

        "softclip"  log scale = a / (1 + |a / log floor|)      zuko's MonotonicAffineTransform (its `slope`)
        "softplus"  scale = softplus(a) + floor                nflows' MaskedAffineAutoregressiveTransform
        "sigmoid"   scale = sigmoid(a + 2) + floor             normflows' MaskedAffineAutoregressive
        "exp"       log scale = a                              the paper's MAF

    Attributes:
        law: One of these names.
        floor: The constant of the law, such as 1e-3; "exp" has none.
        shift_first: Whether the two parameters of a dimension are (shift, a), as in zuko, or (a, shift), as in nflows.

    Raises:
        ArgumentError: The law is unknown, or floor is no number that it can have.
    """

    law: str
    floor: float = 1e-3
    shift_first: bool = True

    def __post_init__(self) -> None:
        check_choice("law", self.law, AFFINE_LAWS)
        check_number("floor", self.floor, 0, open_low=self.law == "softclip")
        if self.law == "softclip" and self.floor == 1:
            raise ArgumentError("floor", "a slope other than 1, whose logarithm divides", self.floor)

    @property
    def parameters(self) -> int:
        """Returns 2, the number of parameters of a dimension."""
        return 2

    def scale_and_shift(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns scale, log scale and shift, each (…). parameters: (…, 2), raw."""
        raw, shift = parameters.unbind(-1)
        if self.shift_first:
            raw, shift = shift, raw
        if self.law == "softplus":
            scale = F.softplus(raw) + self.floor
            return scale, scale.log(), shift
        if self.law == "sigmoid":
            scale = torch.sigmoid(raw + 2) + self.floor
            return scale, scale.log(), shift
        log_scale = raw if self.law == "exp" else raw / (1 + (raw / math.log(self.floor)).abs())
        return log_scale.exp(), log_scale, shift

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Returns z and log dz/dx, each (…). x: (…). parameters: (…, 2), raw."""
        scale, log_scale, shift = self.scale_and_shift(parameters)
        return x * scale + shift, log_scale

    def inverse(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x and log dx/dz, each (…). z: (…). parameters: (…, 2), raw."""
        scale, log_scale, shift = self.scale_and_shift(parameters)
        return (z - shift) / scale, -log_scale


@dataclass(frozen=True)
class Shift:
    """The shift z = x + b, with log dz/dx = 0; its one parameter is b."""

    @property
    def parameters(self) -> int:
        """Returns 1, the number of parameters of a dimension."""
        return 1

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Returns z and log dz/dx, each (…). x: (…). parameters: (…, 1)."""
        return x + parameters[..., 0], torch.zeros_like(x)

    def inverse(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x and log dx/dz, each (…). z: (…). parameters: (…, 1)."""
        return z - parameters[..., 0], torch.zeros_like(z)


@dataclass(frozen=True)
class Spline:
    """The rational-quadratic spline, by the op of `tarflow_fast/spline.py`.

    Attributes:
        law: What its raw parameters mean.
    """

    law: SplineLaw

    @property
    def parameters(self) -> int:
        """Returns the number of parameters of a dimension."""
        return self.law.parameters

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Returns z and log dz/dx, each (…). x: (…). parameters: (…, P), raw."""
        return spline(parameters, x, self.law)

    def inverse(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x and log dx/dz, each (…). z: (…). parameters: (…, P), raw."""
        return spline(parameters, z, self.law, inverse=True)


Univariate = Affine | Shift | Spline
