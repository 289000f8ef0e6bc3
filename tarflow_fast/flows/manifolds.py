"""Manifolds with closed-form geodesics: the unit sphere, and the flat torus of angles."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..checks import check_tensor
from ..errors import ArgumentError

OFF_SPHERE = 1e-3  # how far from 1 the norm of a point may be; it is normalised then


class Manifold(ABC):
    """A compact manifold M of which a model needs points, tangents, geodesics and the uniform distribution.

    Attributes:
        values: The number of values that a point has.
        features: The number of values in which a network sees a point.
        log_volume: The logarithm of M's volume; the uniform density is exp(−log_volume) with respect to it.
    """

    values: int
    features: int
    log_volume: float

    @abstractmethod
    def check(self, name: str, x: Tensor, *, finite: bool = True) -> Tensor:
        """Returns x, (B, values), as points on M. Raises ArgumentError that names the argument for points off it."""

    @abstractmethod
    def uniform(self, n: int, generator: torch.Generator | None, like: Tensor) -> Tensor:
        """Returns n points of the uniform distribution on M, (n, values), in the dtype and on the device of `like`."""

    @abstractmethod
    def project(self, x: Tensor) -> Tensor:
        """Returns the points on M that are closest to x, (B, values), which rounding has led off it."""

    @abstractmethod
    def tangent(self, x: Tensor, v: Tensor) -> Tensor:
        """Returns the part of v that is tangent to M at x, both (B, values), as a function of `project(x)` alone."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Returns what a network sees of x, (B, features): a smooth function on M."""

    @abstractmethod
    def geodesic(self, x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x_t and dx_t/dt, (B, values), of the shortest geodesic from x0 at t = 0 to x1 at t = 1.

        x0, x1: (B, values), points on M. t: (B,), times.
        """


class Sphere(Manifold):
    """The unit sphere {x ∈ ℝᵈ : ‖x‖ = 1}, with great circles, and area 2 π^{d/2} / Γ(d/2)."""

    def __init__(self, values: int):
        if values < 2:
            raise ArgumentError("data_shape", "(d,) with d >= 2 for the sphere in d dimensions", (values,))
        self.values = self.features = values
        self.log_volume = math.log(2) + values / 2 * math.log(math.pi) - math.lgamma(values / 2)

    def check(self, name: str, x: Tensor, *, finite: bool = True) -> Tensor:
        x = check_tensor(name, x, (self.values,), finite=finite)
        off = (torch.linalg.vector_norm(x, dim=1) - 1).abs().max()
        if finite and off > OFF_SPHERE:
            raise ArgumentError(
                name, f"points on the unit sphere, of norm 1 ± {OFF_SPHERE:g}", f"one that is {off:.3g} off"
            )
        return self.project(x)

    def uniform(self, n: int, generator: torch.Generator | None, like: Tensor) -> Tensor:
        return self.project(torch.randn(n, self.values, generator=generator, dtype=like.dtype, device=like.device))

    def project(self, x: Tensor) -> Tensor:
        return x / torch.linalg.vector_norm(x, dim=1, keepdim=True)

    def tangent(self, x: Tensor, v: Tensor) -> Tensor:
        x = self.project(x)
        return v - x * (x * v).sum(1, keepdim=True)

    def encode(self, x: Tensor) -> Tensor:
        return self.project(x)

    def geodesic(self, x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x_t = (sin((1−t)θ) x0 + sin(tθ) x1) / sin θ, cos θ = x0·x1, and its derivative.

        Points closer than 1e-3 are joined by their chord, projected, and so are opposite ones, which many arcs join.
        """
        t = t.unsqueeze(1)
        apart, sum_ = (torch.linalg.vector_norm(part, dim=1, keepdim=True) for part in (x1 - x0, x1 + x0))
        angle = 2 * torch.atan2(apart, sum_)  # exact near 0 and π, where an arccos is not
        sine = angle.sin()
        safe = sine > 1e-3
        sine = torch.where(safe, sine, torch.ones_like(sine))
        arc = (((1 - t) * angle).sin() * x0 + (t * angle).sin() * x1) / sine
        speed = angle * ((t * angle).cos() * x1 - ((1 - t) * angle).cos() * x0) / sine
        x_t = self.project(torch.where(safe, arc, (1 - t) * x0 + t * x1))
        return x_t, self.tangent(x_t, torch.where(safe, speed, x1 - x0))


class Torus(Manifold):
    """The flat torus [0, 2π)ᵈ of d angles in radians, whose opposite sides are one, with volume (2π)ᵈ."""

    def __init__(self, values: int):
        self.values, self.features = values, 2 * values
        self.log_volume = values * math.log(2 * math.pi)

    def check(self, name: str, x: Tensor, *, finite: bool = True) -> Tensor:
        x = check_tensor(name, x, (self.values,), finite=finite)
        if finite and not bool(((x >= 0) & (x <= 2 * math.pi)).all()):
            low, high = float(x.min()), float(x.max())
            raise ArgumentError(name, "angles in radians in [0, 2π]", f"values from {low:.4g} to {high:.4g}")
        return x

    def uniform(self, n: int, generator: torch.Generator | None, like: Tensor) -> Tensor:
        return 2 * math.pi * torch.rand(n, self.values, generator=generator, dtype=like.dtype, device=like.device)

    def project(self, x: Tensor) -> Tensor:
        return x.remainder(2 * math.pi)

    def tangent(self, x: Tensor, v: Tensor) -> Tensor:
        return v

    def encode(self, x: Tensor) -> Tensor:
        return torch.cat([x.cos(), x.sin()], dim=1)

    def geodesic(self, x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x_t = x0 + t δ modulo 2π, and δ, the difference x1 − x0 modulo 2π in [−π, π)."""
        delta = (x1 - x0 + math.pi).remainder(2 * math.pi) - math.pi
        return self.project(x0 + t.unsqueeze(1) * delta), delta


def manifold_named(name: str, values: int) -> Manifold:
    """Returns the "sphere" in ℝᵈ or the "torus" of d angles. values: d."""
    return Sphere(values) if name == "sphere" else Torus(values)
