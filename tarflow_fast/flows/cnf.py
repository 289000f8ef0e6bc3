"""FFJORD: a continuous flow that is trained by maximum likelihood (Grathwohl et al., 2019, arXiv 1810.01367)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..checks import Labels, check_number
from .ode_flow import ODEFlow, ODEOptions


class CNF(ODEFlow):
    """log p(x₁) = log N(x₀; 0, I) − ∫₀¹ tr(dv/dx) dt, dx/dt = v(x, t; y), whose network is trained on log p itself.

    Gradients come through the solver's steps, or from the adjoint ODE (Chen et al., 2018, arXiv 1806.07366). The
    trace is exact, or Hutchinson's estimate with a probe that is drawn once for a solution.
    """

    @dataclass(frozen=True)
    class Options(ODEOptions):
        """The options of FFJORD, which are those of every ODE and those of its training.

        Attributes:
            adjoint: Whether gradients come from the adjoint ODE, whose memory does not grow with the number of
                evaluations. Through the steps they take half the time, and are exact for the steps that were taken.
            training_tolerance: The tolerance of a training step, which may be wider than that of densities.
            kinetic: The weight of ∫ ‖v‖² dt / dims in the loss, which keeps trajectories easy to solve (Finlay et al.,
                2020, arXiv 2002.02798); 0 trains on the likelihood alone.
        """

        width: int = 64
        blocks: int = 2
        octaves: int = 0
        adjoint: bool = False
        training_tolerance: float = 1e-3
        kinetic: float = 0.01

        def __post_init__(self) -> None:
            super().__post_init__()
            check_number("training_tolerance", self.training_tolerance, 0, 1, open_low=True)
            check_number("kinetic", self.kinetic, 0)

    options: Options

    def loss(self, x: Tensor, y: Labels = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Returns (−mean(log p(x | y)) + kinetic · mean(∫ ‖v‖² dt)) / dims, in nats per value.

        x: (B, *data_shape). y: labels as in `log_prob`. generator: what Hutchinson's probes come from.
        """
        x = self.check_data(x, finite=False)
        ode = replace(self.ode, tolerance=max(self.ode.tolerance, self.options.training_tolerance))
        z, log_det, energy = self.transport(
            x, self.context(y, len(x)), 1.0, 0.0, ode, generator, adjoint=self.options.adjoint, energy=True
        )
        log_prob = self.prior_log_prob(z) + log_det
        return (self.options.kinetic * energy - log_prob).mean() / self.dims
