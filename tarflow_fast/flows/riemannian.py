"""Riemannian flow matching on the sphere and on the torus (Chen and Lipman, 2024, arXiv 2302.03660)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..checks import Labels, check_count
from .manifolds import manifold_named
from .ode_flow import ODEFlow, ODEOptions
from .velocity import VectorVelocity


class RiemannianFlowMatching(ODEFlow):
    """min_v E ‖v(x_t, t; y) − dx_t/dt‖², where x_t is the geodesic from x₀, uniform on M, to x₁, data on M.

    Samples solve dx/dt = v(x, t) on M, where v is the tangent part of the network's output. Densities are with respect
    to M's own volume: log p(x₁) = −log vol(M) − ∫₀¹ div v dt. The divergence on M is that in the space around it of v
    continued constantly across M, so that both directions are one ordinary ODE, which never leaves M but by rounding.
    """

    @dataclass(frozen=True)
    class Options(ODEOptions):
        """The options of Riemannian flow matching, beside those of every ODE, which has fewer octaves for smoothness.

        Attributes:
            manifold: "sphere", whose points are unit vectors, or "torus", whose points are angles in [0, 2π).
        """

        octaves: int = 1
        manifold: Literal["sphere", "torus"] = "sphere"

    trained_by_likelihood: ClassVar[bool] = False
    options: Options

    def __init__(self, data_shape: tuple[int, ...], num_classes: int = 0, options: Options | None = None):
        (values,) = data_shape
        self.manifold = manifold_named((options or self.Options()).manifold, values)
        super().__init__(data_shape, num_classes, options)

    def check_data(self, x: Tensor, *, finite: bool = True) -> Tensor:
        """Returns x, (B, values), as points on the manifold. Raises ArgumentError for points off it."""
        return self.manifold.check("x", x, finite=finite)

    def field(self, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        """Returns v(x, t; y), (B, values), tangent at x. t: () or (B,), time. context: one-hot classes, or None."""
        return self.manifold.tangent(x, self.velocity(self.manifold.encode(x), t, context))

    def loss(self, x: Tensor, y: Labels = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Returns the mean square of v − dx_t/dt over a batch and its values.

        x: (B, values), points on the manifold. y: labels as in `log_prob`. generator: what x₀ and t come from.
        """
        x = self.check_data(x)
        x0 = self.manifold.uniform(len(x), generator, x)
        t = torch.rand(len(x), generator=generator, dtype=x.dtype, device=x.device)
        x_t, speed = self.manifold.geodesic(x0, x, t)
        return (self.field(x_t, t, self.context(y, len(x))) - speed).square().mean()

    def inverse(
        self, z: Tensor, y: Labels = None, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        return super().inverse(self.manifold.check("z", z), y, generator=generator)

    def prior_log_prob(self, z: Tensor) -> Tensor:
        """Returns the uniform log-density −log vol(M), (B,) in nats. z: (B, values)."""
        return torch.full_like(z[:, 0], -self.manifold.log_volume)

    def latents(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Returns n uniform points of the manifold, (n, values), on the model's device and in its dtype."""
        return self.manifold.uniform(check_count("n", n), generator, self.place)

    def projection(self) -> Callable[[Tensor], Tensor]:
        return self.manifold.project

    def _network(self) -> nn.Module:
        m, o = self.manifold, self.options
        return VectorVelocity(m.features, m.values, self.num_classes, o.width, o.blocks, o.octaves)
