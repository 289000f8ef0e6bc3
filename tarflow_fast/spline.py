"""A monotone rational-quadratic spline with linear tails (Durkan et al., arXiv 1906.04032), both ways, in PyTorch.

    y = y₀ + h · (h θ² + w d₀ θφ) / (h (θ² + φ²) + w (d₀ + d₁) θφ),   θ = (x − x₀) / w,   φ = 1 − θ

(x₀, y₀) is the lower left corner of the bin that x lies in, w and h are its width and height, d₀ and d₁ the derivatives
at its two ends. Every term is positive, so nothing cancels. The inverse is written so that the same holds for it: with
η = (y − y₀) / h, ζ = 1 − η and q = w (d₀ ζ − d₁ η), the discriminant is a sum of squares, which no rounding makes
negative, and each of the two forms of θ adds positive terms where it is used:

    r = √(q² + 4 h² ηζ),   θ = 2hη / (2hη + q + r) if q ≥ 0,   θ = (r − q) / (r − q + 2hζ) if q < 0

Libraries differ in how they make knots of a network's outputs; a `SplineLaw` says how. Everything after the parameters
is computed in float64, whatever their dtype: a step in a steep bin magnifies the rounding of its knots by the spline's
derivative, which is up to 1e6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ArgumentError
from .native import address, choose_instruction_set, load_native


@dataclass(frozen=True)
class SplineLaw:
    """A `SplineLaw` says what the parameters of a spline are: K widths, K heights and the derivatives, in this order.

        e = softmax(clip(p / divisor, soft_clip / 2)),   size of a bin = (high − low) · (min + (1 − K min) · e)
        d = min_derivative + exp(clip(p, soft_clip)) or, unless exponential, min_derivative + softplus(p)

    with clip(p, c) = p / (1 + |p| / c), which is left out where soft_clip is 0.

    Attributes:
        bins: K, the number of bins.
        low: The lower end of the interval that the spline maps to itself.
        high: Its upper end.
        soft_clip: The bound of the parameters of derivatives, and twice that of widths and heights; 0 for none.
        min_width: The least share of the interval that a bin is wide, below 1 / K.
        min_height: The least share of the interval that a bin is high, below 1 / K.
        min_derivative: What is added to each derivative.
        divisor: What the parameters of widths and heights are divided by.
        exponential: Whether derivatives are exponentials, else softplus.
        tails: Whether the map is the identity outside of the interval, and the derivative 1 at both of its ends: K − 1
            derivatives are parameters. Without, there are K + 1, and a value outside has no image: it becomes NaN.
        ends: Whether there are K + 1 derivatives with tails too, as circular splines have them, of which the first and
            the last one are equal.
    """

    bins: int
    low: float
    high: float
    soft_clip: float = 0.0
    min_width: float = 0.0
    min_height: float = 0.0
    min_derivative: float = 0.0
    divisor: float = 1.0
    exponential: bool = False
    tails: bool = True
    ends: bool = False

    def __post_init__(self) -> None:
        if self.bins < 1:
            raise ArgumentError("bins", "at least 1", self.bins)
        if not -math.inf < self.low < self.high < math.inf:
            raise ArgumentError("high", f"a finite number above low = {self.low}", self.high)
        for name in ("min_width", "min_height"):
            if not 0 <= getattr(self, name) * self.bins <= 1:
                raise ArgumentError(name, f"a number from 0 to 1 / bins = {1 / self.bins:.3g}", getattr(self, name))
        if self.soft_clip < 0:
            raise ArgumentError("soft_clip", "0, for none, or a positive number", self.soft_clip)
        if not self.divisor > 0:
            raise ArgumentError("divisor", "a positive number", self.divisor)

    @classmethod
    def zuko(cls, bins: int, bound: float = 5.0, slope: float = 1e-3) -> SplineLaw:
        """Returns the law of zuko's `MonotonicRQSTransform`; its arguments are meant as there."""
        return cls(bins, -bound, bound, soft_clip=abs(math.log(slope)), exponential=True)

    @classmethod
    def nflows(
        cls,
        bins: int,
        tail_bound: float | None = 1.0,
        *,
        min_bin_width: float = 1e-3,
        min_bin_height: float = 1e-3,
        min_derivative: float = 1e-3,
        divisor: float = 1.0,
    ) -> SplineLaw:
        """Returns the law of nflows' rational-quadratic transforms, whose arguments it takes.

        tail_bound: the end of the interval, which begins at its negative; None for nflows' `tails=None`, the interval
        from 0 to 1 without tails. divisor: √hidden_features where the transform's network has this attribute, else 1.
        """
        low, high = (0.0, 1.0) if tail_bound is None else (-tail_bound, tail_bound)
        return cls(
            bins,
            low,
            high,
            min_width=min_bin_width,
            min_height=min_bin_height,
            min_derivative=min_derivative,
            divisor=divisor,
            tails=tail_bound is not None,
        )

    @classmethod
    def normflows(cls, bins: int, tail_bound: float | None = 3.0, **options: float) -> SplineLaw:
        """Returns the law of normflows' splines with linear tails, which is that of nflows with another bound."""
        return cls.nflows(bins, tail_bound, **options)

    @property
    def parameters(self) -> int:
        """Returns the number of parameters of one value: 3K − 1, or 3K + 1 without tails or with ends."""
        return 3 * self.bins + (-1 if self.inner else 1)

    @property
    def inner(self) -> bool:
        """Returns whether the derivatives at both ends are 1, and no parameters."""
        return self.tails and not self.ends


class Knots(NamedTuple):
    """The `Knots` of splines are what the parameters mean: corners of bins, and derivatives there, (…, K + 1) each.

    x, y: increasing from low to high, in the data's unit. derivative: dy/dx at each knot.
    """

    x: Tensor
    y: Tensor
    derivative: Tensor


def _clip(p: Tensor, bound: float) -> Tensor:
    """Returns p / (1 + |p| / bound), or p where the bound is 0."""
    return p / (1 + p.abs() / bound) if bound else p


def _edges(p: Tensor, law: SplineLaw, least: float) -> Tensor:
    """Returns the K + 1 ends of the bins whose sizes have these parameters; the first and the last are exact."""
    share = least + (1 - least * law.bins) * _clip(p / law.divisor, law.soft_clip / 2).softmax(-1)
    inner = law.low + (law.high - law.low) * share[..., :-1].cumsum(-1)
    return torch.cat([torch.full_like(p[..., :1], law.low), inner, torch.full_like(p[..., :1], law.high)], -1)


def knots(parameters: Tensor, law: SplineLaw) -> Knots:
    """Returns the knots that these parameters stand for.

    parameters: (…, P) fp32 or fp64, P = law.parameters: K widths, K heights and the derivatives. The knots have its
    dtype. Raises ArgumentError if the last dimension has another size.
    """
    if parameters.shape[-1:] != (law.parameters,):
        raise ArgumentError("parameters", f"{law.parameters} values in the last dimension", tuple(parameters.shape))
    K = law.bins
    p = _clip(parameters[..., 2 * K :], law.soft_clip)
    derivative = law.min_derivative + (p.exp() if law.exponential else F.softplus(p))
    if law.inner:
        derivative = F.pad(derivative, (1, 1), value=1.0)
    return Knots(
        _edges(parameters[..., :K], law, law.min_width),
        _edges(parameters[..., K : 2 * K], law, law.min_height),
        derivative,
    )


def _within(value: Tensor, at: Knots, inverse: bool) -> tuple[Tensor, Tensor]:
    """Returns the image of values that lie in the interval of the knots, and log dy/dx there, in nats."""
    of = at.y if inverse else at.x
    left = (value.unsqueeze(-1) >= of[..., 1:-1]).sum(-1, keepdim=True)
    tiny = torch.finfo(value.dtype).tiny ** 0.5  # so that a bin whose size was rounded to 0 divides nothing by it

    def ends(knots: Tensor) -> tuple[Tensor, Tensor]:
        knots = knots.expand(*left.shape[:-1], -1)
        return knots.gather(-1, left).squeeze(-1), knots.gather(-1, left + 1).squeeze(-1)

    (x0, x1), (y0, y1), (d0, d1) = ends(at.x), ends(at.y), ends(at.derivative.clamp_min(tiny))
    w, h = (x1 - x0).clamp_min(tiny), (y1 - y0).clamp_min(tiny)
    if inverse:
        eta = ((value - y0) / h).clamp(0, 1)
        zeta = 1 - eta
        q = w * (d0 * zeta - d1 * eta)
        r = (q * q + 4 * h * h * eta * zeta).sqrt()
        theta = torch.where(q < 0, (r - q) / (r - q + 2 * h * zeta), 2 * h * eta / (2 * h * eta + q + r))
        phi = torch.where(q < 0, 2 * h * zeta / (r - q + 2 * h * zeta), (q + r) / (2 * h * eta + q + r))
    else:
        theta = ((value - x0) / w).clamp(0, 1)
        phi = 1 - theta
    bottom = h * (theta**2 + phi**2) + w * (d0 + d1) * theta * phi
    top = w * (d1 * theta**2 + d0 * phi**2) + 2 * h * theta * phi
    log_derivative = 2 * (h / bottom).log() + (top / w).log()
    if inverse:
        return x0 + theta * w, log_derivative
    return y0 + h * (h * theta**2 + w * d0 * theta * phi) / bottom, log_derivative


def spline(parameters: Tensor, value: Tensor, law: SplineLaw, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """Returns the spline's image of each value, y of x, or x of y with `inverse`, and the log-derivative of that map.

    It is differentiable any number of times. A NaN stays one, also that of a parameter.

    Args:
        parameters: (…, P) fp32 or fp64, P = law.parameters, those of each value; the dimensions before the last are
            broadcast against those of `value`.
        value: (…), of the parameters' dtype.
        law: What the parameters mean.
        inverse: Whether the map is x of y.

    Returns:
        The image, and log dy/dx, or log dx/dy with `inverse`, in nats; both have the dtype of `value`.

    Raises:
        ArgumentError: The parameters have another size than the law says, or another dtype than the values.
    """
    if parameters.dtype != value.dtype:
        raise ArgumentError("parameters", f"{value.dtype}, as the values are", str(parameters.dtype))
    wide = value if value.device.type == "mps" else value.double()  # Apple's GPUs have no float64
    at = knots(parameters.to(wide.dtype), law)
    outside = (wide < law.low) | (wide > law.high)
    image, log_derivative = _within(torch.where(outside, law.low, wide), at, inverse)
    log_derivative = -log_derivative if inverse else log_derivative
    image = image - (image - law.high).clamp_min(0).detach()  # rounding leads out, where it has no inverse
    if law.tails:
        image, log_derivative = torch.where(outside, wide, image), torch.where(outside, 0.0, log_derivative)
    else:
        image, log_derivative = (torch.where(outside, torch.nan, of) for of in (image, log_derivative))
    return image.to(value.dtype), log_derivative.to(value.dtype)


def native_law(law: SplineLaw) -> dict[str, float]:
    """Returns a law by the names of native code, see csrc/cpu/spline.h."""
    return {name: float(getattr(law, name)) for name in (*law.__dataclass_fields__, "parameters")}


def spline_native(
    parameters: Tensor, value: Tensor, law: SplineLaw, *, inverse: bool = False, instruction_set: str | None = None
) -> tuple[Tensor, Tensor]:
    """Returns what `spline` does, by the compiled module of the CPU (`csrc/cpu/spline.inl`), without gradients.

    parameters: (…, P) fp32 or fp64 on the CPU. value: (…), of the same dtype and leading dimensions. instruction_set:
    one of `native.instruction_sets()`, by default the best. Raises ArgumentError, or BackendError where the module was
    not built.
    """
    if value.dtype not in (torch.float32, torch.float64):
        raise ArgumentError("value", "float32 or float64", str(value.dtype))
    if parameters.shape != (*value.shape, law.parameters):
        raise ArgumentError("parameters", f"shape {(*value.shape, law.parameters)}", tuple(parameters.shape))
    parameters, value = parameters.detach().contiguous(), value.detach().contiguous()
    image, log_derivative = torch.empty_like(value), torch.empty_like(value)
    load_native().spline(
        law=native_law(law),
        parameters=address("parameters", parameters, value.dtype),
        value=address("value", value, value.dtype),
        image=address("image", image, value.dtype),
        log_derivative=address("log_derivative", log_derivative, value.dtype),
        count=value.numel(),
        wide=value.dtype == torch.float64,
        inverse=inverse,
        instruction_set=choose_instruction_set(instruction_set),
    )
    return image, log_derivative
