"""Flow matching: an ODE whose velocity is learnt from straight paths (Lipman et al., 2023, arXiv 2210.02747)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..checks import Labels, check_count, check_number
from .ode import State, integrate
from .ode_flow import ODEFlow, ODEOptions

LEAST, MOST, VALUES = 32, 1024, 2**15  # trajectories that straightness is measured by, and values in them


class FlowMatching(ODEFlow):
    """min_v E ‖v(x_t, t; y) − (x₁ − (1 − σ) x₀)‖², x_t = (1 − (1 − σ) t) x₀ + t x₁.

    The expectation is over noise x₀ ~ N(0, I), data x₁ and t ~ U(0, 1). No ODE is solved in training. Noise and data
    are paired at random, or within each batch by optimal transport (Tong et al., 2024, arXiv 2302.00482; Pooladian et
    al., 2023, arXiv 2304.14772), whose trajectories are straighter.
    """

    @dataclass(frozen=True)
    class Options(ODEOptions):
        """The options of flow matching, beside those of every ODE.

        Attributes:
            coupling: How noise is paired with data: "independent", or "optimal", by the assignment of least squared
                distance in each batch, among the samples of one class.
            sigma: σ, the standard deviation of noise that is left at t = 1.
        """

        coupling: Literal["independent", "optimal"] = "independent"
        sigma: float = 0.0

        def __post_init__(self) -> None:
            super().__post_init__()
            check_number("sigma", self.sigma, 0, 1)

    trained_by_likelihood: ClassVar[bool] = False
    options: Options

    def loss(self, x: Tensor, y: Labels = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Returns the mean square of v − (x₁ − (1 − σ) x₀) over a batch and its values.

        x: (B, *data_shape) x₁. y: labels as in `log_prob`. generator: what x₀ and t come from.
        """
        x = self.check_data(x, finite=False)
        context = self.context(y, len(x))
        z = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        if self.options.coupling == "optimal":
            z = optimally_paired(z, x, context)
        return self.regression(z, x, context, generator)

    def regression(self, z: Tensor, x: Tensor, context: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """Returns the loss of pairs x₀ = z, x₁ = x, both (B, *data_shape), at times drawn for each of them."""
        kept = 1 - self.options.sigma
        t = torch.rand(len(x), generator=generator, dtype=x.dtype, device=x.device)
        s = t.reshape(-1, *[1] * (x.dim() - 1))
        v = self.field((1 - kept * s) * z + s * x, t, context)
        return (v - (x - kept * z)).square().mean()

    @torch.no_grad()
    def straightness(self, n: int = 1024, y: Labels = None, *, generator: torch.Generator | None = None) -> float:
        """Returns E ∫₀¹ ‖v(x_t, t) − (x₁ − x₀)‖² dt / E ‖x₁ − x₀‖² along the ODE's own trajectories.

        It is 0 where they are straight and run at constant speed, so that one step of Euler's method is exact (Liu et
        al., 2023, arXiv 2209.03003). As ∫ v dt = x₁ − x₀, the first expectation is E ∫ ‖v‖² dt − E ‖x₁ − x₀‖².

        n: how many trajectories. y: labels as in `sample`. generator: what their noise comes from.
        """
        z = self.latents(check_count("n", n), generator)
        context = self.context(y, n)

        def field(t: Tensor, state: State) -> State:
            v = self.field(state[0], t, context)
            return v, v.square().flatten(1).sum(1)

        (x, energy), _ = integrate(field, (z, z.new_zeros(n)), 0.0, 1.0, self.ode)
        distance = (x - z).square().flatten(1).double().sum()
        return float((energy.double().sum() - distance) / distance) if distance > 0 else 0.0

    def figures(self, generator: torch.Generator | None = None) -> dict[str, float]:
        """Returns the figures that an evaluation reports beside the density: the straightness of trajectories."""
        trajectories = max(LEAST, min(MOST, VALUES // self.dims))
        return {"straightness": self.straightness(trajectories, generator=generator)}


def optimally_paired(z: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
    """Returns the rows of z in the order π that minimises Σ ‖z_π(i) − x_i‖².

    With classes it does so among the rows of each: noise that was shared out between classes would be N(0, I) for all
    of them together, and for none of them alone.

    z: (B, …) noise. x: (B, …) data. context: (B, C) one-hot classes, or None.
    """
    groups = torch.zeros(len(x), dtype=torch.long, device=x.device)
    if context is not None:
        groups = torch.unique(context, dim=0, return_inverse=True)[1]
    paired = torch.empty_like(z)
    for group in range(int(groups.max()) + 1):
        rows = (groups == group).nonzero().squeeze(1)
        cost = torch.cdist(x[rows].flatten(1).double(), z[rows].flatten(1).double()).square()
        _, chosen = linear_sum_assignment(cost.cpu().numpy())  # rows come back in order
        paired[rows] = z[rows[torch.as_tensor(chosen, device=rows.device)]]
    return paired
