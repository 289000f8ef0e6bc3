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

from ..checks import check_choice, check_count, check_number
from ..errors import ArgumentError

AFFINE_LAWS = ("softclip", "softplus", "sigmoid", "exp")
SPLINE_LAWS = ("softclip", "floor")


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
    """The rational-quadratic spline with K bins of Durkan et al. (arXiv 1906.04032), on [low, high] in x and in z.

    The raw parameters of a dimension are K of widths w, K of heights h, and then those of the derivatives d at the
    knots: K − 1 of the inner ones, where both ends have derivative 1 and the transform is the identity outside; or
    K + 1 with `free_edges`, where nothing is defined outside. They become bins by one of these laws, the same for
    heights as for widths:

        "softclip"  w' = w / (1 + |2 w / log slope|),  width = softmax(w'),  derivative = exp(d / (1 + |d / log slope|))
                                                                                          zuko's MonotonicRQSTransform
        "floor"     width = min_width + (1 − K · min_width) · softmax(size_scale · w),
                    derivative = min_derivative + softplus(d)                             Durkan's: nflows, normflows

    and widths, which sum to 1, are multiplied by high − low.

    Attributes:
        bins: K.
        law: One of these names.
        low: The first knot, in x and in z.
        high: The last knot, in x and in z.
        slope: The constant of "softclip".
        min_width: The least share of a bin in x, of "floor".
        min_height: The least share of a bin in z, of "floor".
        min_derivative: The least derivative at a knot, of "floor".
        size_scale: What raw widths and heights are multiplied by, of "floor".
        free_edges: Whether the derivatives at both ends are parameters.

    Raises:
        ArgumentError: A value is of another type or out of range.
    """

    bins: int
    law: str
    low: float
    high: float
    slope: float = 1e-3
    min_width: float = 1e-3
    min_height: float = 1e-3
    min_derivative: float = 1e-3
    size_scale: float = 1.0
    free_edges: bool = False

    def __post_init__(self) -> None:
        check_count("bins", self.bins, 1)
        check_choice("law", self.law, SPLINE_LAWS)
        if not self.low < self.high:
            raise ArgumentError("low, high", "low < high", (self.low, self.high))
        check_number("slope", self.slope, 0, 1, open_low=True)
        for name in ("min_width", "min_height"):
            check_number(name, getattr(self, name), 0, 1 / self.bins)
        check_number("min_derivative", self.min_derivative, 0)

    @property
    def parameters(self) -> int:
        """Returns the number of parameters of a dimension: 3 K − 1, or 3 K + 1 with free edges."""
        return 3 * self.bins + (1 if self.free_edges else -1)

    @property
    def native(self) -> dict[str, float]:
        """Returns the spline by the names of native code, see `SplineLaw` in csrc/cpu/spline.h."""
        soft = self.law == "softclip"
        return {
            "bins": self.bins,
            "low": self.low,
            "high": self.high,
            "soft_clip": -math.log(self.slope) if soft else 0.0,
            "min_width": 0.0 if soft else self.min_width,
            "min_height": 0.0 if soft else self.min_height,
            "min_derivative": 0.0 if soft else self.min_derivative,
            "divisor": 1 / self.size_scale,
            "exponential": soft,
            "tails": not self.free_edges,
            "parameters": self.parameters,
        }

    def knots(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the knots in x and in z and the derivatives there, each (…, K + 1). parameters: (…, P), raw."""
        K = self.bins
        raw = parameters[..., :K], parameters[..., K : 2 * K], parameters[..., 2 * K :]
        if self.law == "softclip":
            limit = math.log(self.slope)
            sizes = [(each / (1 + (2 * each / limit).abs())).softmax(-1) for each in raw[:2]]
            derivatives = (raw[2] / (1 + (raw[2] / limit).abs())).exp()
        else:
            least = self.min_width, self.min_height
            sizes = [
                low + (1 - low * K) * (each * self.size_scale).softmax(-1)
                for low, each in zip(least, raw[:2], strict=True)
            ]
            derivatives = self.min_derivative + F.softplus(raw[2])
        if not self.free_edges:
            derivatives = F.pad(derivatives, (1, 1), value=1.0)
        inner = [self.low + (self.high - self.low) * each[..., :-1].cumsum(-1) for each in sizes]
        x, z = (
            torch.cat([torch.full_like(each[..., :1], self.low), knots, torch.full_like(each[..., :1], self.high)], -1)
            for each, knots in zip(sizes, inner, strict=True)
        )
        return x, z, derivatives

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Returns z and log dz/dx, each (…). x: (…). parameters: (…, P), raw."""
        return _spline(self, x, parameters, inverse=False)

    def inverse(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x and log dx/dz, each (…). z: (…). parameters: (…, P), raw."""
        return _spline(self, z, parameters, inverse=True)


Univariate = Affine | Shift | Spline


def _spline(spline: Spline, values: Tensor, parameters: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
    """Returns the spline's forward or inverse, and its log-derivative in that direction."""
    xs, zs, ds = spline.knots(parameters)
    knots = zs if inverse else xs
    inside = (values >= spline.low) & (values <= spline.high)
    v = torch.where(inside, values, (spline.low + spline.high) / 2)
    bin = (v[..., None] >= knots[..., 1:-1]).sum(-1, keepdim=True)

    def at(table: Tensor, index: Tensor) -> Tensor:
        return table.expand(*index.shape[:-1], table.shape[-1]).gather(-1, index)[..., 0]

    x0, z0, d0 = (at(table, bin) for table in (xs, zs, ds))
    x1, z1, d1 = (at(table, bin + 1) for table in (xs, zs, ds))
    width, height = x1 - x0, z1 - z0
    s = height / width
    bend = d0 + d1 - 2 * s
    if inverse:
        # c ≤ 0 and b ≥ 0 up to rounding, and the discriminant is a sum of squares where the spline is increasing
        y = v - z0
        a = height * (s - d0) + y * bend
        b = height * d0 - y * bend
        c = -s * y
        t = (2 * c / (-b - (b * b - 4 * a * c).clamp_min(0).sqrt())).clamp(0, 1)
        moved = x0 + t * width
    else:
        t = (v - x0) / width
        moved = z0 + height * (s * t * t + d0 * t * (1 - t)) / (s + bend * t * (1 - t))
    slope = s * s * (d1 * t * t + 2 * s * t * (1 - t) + d0 * (1 - t) ** 2) / (s + bend * t * (1 - t)) ** 2
    log_slope = slope.log()
    if inverse:
        log_slope = -log_slope
    return torch.where(inside, moved, values), torch.where(inside, log_slope, 0)
