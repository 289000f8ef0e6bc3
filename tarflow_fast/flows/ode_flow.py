"""Flows that are ODEs: dx/dt = v(x, t; y) carries noise at t = 0 to data at t = 1, and its density along."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..checks import Labels, check_count, check_tensor
from .base import FamilyFlow
from .divergence import Noise, draw_probe, with_divergence
from .ode import EVALUATIONS, ODE, Method, State, check_finite, fixed_steps, integrate
from .step_graphs import StepGraphs
from .velocity import velocity_network

EXACT_UP_TO = 16  # values of a sample, up to which trace="auto" is the exact one, which takes as many backward passes


@dataclass(frozen=True)
class ODEOptions:
    """The options that all flows of ODEs have.

    Attributes:
        width: For vectors, the units of the MLP.
        channels: For images, the channels of the U-Net at its finer resolution; the coarser one has twice as many.
        blocks: The number of residual blocks, for images at each resolution.
        octaves: How many octaves of sines and cosines of vectors their network sees beside them. They make edges
            sharper, and the ODE stiffer.
        solver: How the ODE is solved, for samples and for densities: "dopri5" and "dopri8" to a tolerance, and
            "euler", "midpoint" and "rk4" in fixed steps.
        steps: How many steps a solver of fixed steps takes.
        tolerance: The error that the other solvers allow themselves in one step.
        max_evaluations: How many evaluations of the network count as a divergence of the ODE.
        trace: How densities take the divergence of v: "exact", or by Hutchinson's estimate with one probe for each
            sample, which needs one backward pass, however large samples are; "auto": exact up to 16 values.
        noise: The distribution of Hutchinson's probes.
    """

    width: int = 128
    channels: int = 32
    blocks: int = 3
    octaves: int = 3
    solver: Method = "dopri5"
    steps: int = 32
    tolerance: float = 1e-5
    max_evaluations: int = 10_000
    trace: Literal["auto", "exact", "hutchinson"] = "auto"
    noise: Noise = "rademacher"

    def __post_init__(self) -> None:
        check_count("width", self.width)
        check_count("channels", self.channels)
        check_count("blocks", self.blocks)
        check_count("octaves", self.octaves, low=0, high=16)
        self.ode()

    def ode(self) -> ODE:
        """Returns the solver, its steps and its tolerance. Raises ArgumentError where they are out of range."""
        return ODE(self.solver, self.steps, self.tolerance, self.max_evaluations)


def _exact_trace(options: ODEOptions, dims: int) -> bool:
    """Returns whether samples of so many values have the exact divergence."""
    return options.trace == "exact" or (options.trace == "auto" and dims <= EXACT_UP_TO)


class ODEFlow(FamilyFlow):
    """log p(x₁) = log p₀(x₀) − ∫₀¹ ∇·v(x_t, t) dt, where x_t solves dx/dt = v(x, t; y) and ends in x₁ at t = 1.

    `forward` is the ODE from t = 1 to 0, `inverse` from 0 to 1, both with the integral (Chen et al., 2018, arXiv
    1806.07366). The trajectories have a cost, the number of evaluations of v, which `evaluations` reports.

    Attributes:
        ode: How samples and densities are solved for. It may be set to another `ODE` at any time.
        velocity: The network.
    """

    exact: ClassVar[bool] = False
    for_vectors = ("width", "octaves")
    for_images = ("channels",)
    options: ODEOptions

    @classmethod
    def idle_options(cls, data_shape: tuple[int, ...], options: ODEOptions) -> dict[str, str]:
        """Returns what `FamilyFlow.idle_options` does; an exact trace draws no noise."""
        idle = super().idle_options(data_shape, options)
        return idle | ({"noise": "trace='hutchinson'"} if _exact_trace(options, math.prod(data_shape)) else {})

    def __init__(self, data_shape: tuple[int, ...], num_classes: int = 0, options: ODEOptions | None = None):
        super().__init__(data_shape, num_classes, options)
        self.velocity = self._network()
        self.ode = self.options.ode()
        self._graphs = StepGraphs()
        self._evaluations: int | None = None

    def evaluations(self) -> int | None:
        return self._evaluations

    def field(self, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        """Returns v(x, t; y), (B, *data_shape). t: () or (B,), time. context: one-hot classes, or None."""
        return self.velocity(x, t, context)

    def forward(
        self, x: Tensor, y: Labels = None, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        x = self.check_data(x, finite=False)
        z, log_det = self.transport(x, self.context(y, len(x)), 1.0, 0.0, self.ode, generator)
        return z, log_det

    def inverse(
        self, z: Tensor, y: Labels = None, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        z = check_tensor("z", z, self.data_shape, finite=False)
        x, log_det = self.transport(z, self.context(y, len(z)), 0.0, 1.0, self.ode, generator)
        return x, log_det

    def log_prob(self, x: Tensor, y: Labels = None, *, generator: torch.Generator | None = None) -> Tensor:
        x = self.check_data(x)
        z, log_det = self.forward(x, y, generator=generator)
        return self.prior_log_prob(z) + log_det

    @torch.no_grad()
    def sample(
        self, n: int, y: Labels = None, *, generator: torch.Generator | None = None, ode: ODE | None = None
    ) -> Tensor:
        """Returns n samples of p(x | y), (n, *data_shape): the ODE's solutions at t = 1 from noise at t = 0.

        With fixed steps all of them are one CUDA graph on a GPU, see `StepGraphs`.

        n: how many. y: one label for all, or n of them. generator: what the noise comes from. ode: how they are solved
        for, `self.ode` if None.
        """
        z = self.latents(check_count("n", n), generator)
        return self.solve(z, self.context(y, n), self.ode if ode is None else ode)

    @torch.no_grad()
    def solve(self, z: Tensor, context: Tensor | None, ode: ODE) -> Tensor:
        """Returns x₁, (B, *data_shape), of the ODE that begins in x₀ = z; no gradients are recorded.

        z: (B, *data_shape), noise. context: one-hot classes, or None. ode: how it is solved.
        """

        given = () if context is None else (context,)
        if ode.adaptive:
            state, self._evaluations = integrate(self._moving(*given), (z,), 0.0, 1.0, ode, project=self.projection())
            return state[0]

        def run(z: Tensor, *given: Tensor) -> Tensor:
            return fixed_steps(self._moving(*given), (z,), 0.0, 1.0, ode, project=self.projection())[0]

        x = self._graphs.run(ode, run, (z, *given), self)
        self._evaluations = ode.steps * EVALUATIONS[ode.method]
        check_finite((x,), 1.0)
        return x

    def transport(
        self,
        x: Tensor,
        context: Tensor | None,
        start: float,
        end: float,
        ode: ODE,
        generator: torch.Generator | None = None,
        *,
        adjoint: bool = True,
        energy: bool = False,
    ) -> State:
        """Returns x(end), (B, *data_shape), and log|det dx(end)/dx(start)| = ∫ ∇·v dt from start to end, (B,).

        With `energy` it returns ∫ ‖v‖² |dt|, (B,), too.

        x: (B, *data_shape), the state at `start`. context: one-hot classes, or None. ode: how it is solved. generator:
        what Hutchinson's probes come from. adjoint: whether an adaptive solver's gradients come from the adjoint ODE.
        energy: whether the energy of the trajectories is integrated.
        """
        probe = None if _exact_trace(self.options, self.dims) else draw_probe(x, self.options.noise, generator)

        def field(t: Tensor, state: State) -> State:
            v, trace = with_divergence(lambda at: self.field(at, t, context), state[0], probe)
            return (v, trace, sign * v.square().flatten(1).sum(1)) if energy else (v, trace)

        sign = 1.0 if end > start else -1.0
        zero = x.new_zeros(len(x))
        state, self._evaluations = integrate(
            field,
            (x, zero, zero) if energy else (x, zero),
            start,
            end,
            ode,
            project=self.projection(),
            parameters=self.velocity.parameters() if adjoint else None,
        )
        return state

    def projection(self) -> Callable[[Tensor], Tensor] | None:
        """Returns what points are put through that rounding may have led off a manifold; None in a flat space."""
        return None

    def _moving(self, context: Tensor | None = None) -> Callable[[Tensor, State], State]:
        """Returns the field of the state (x,) alone."""
        return lambda t, state: (self.field(state[0], t, context),)

    def _network(self) -> torch.nn.Module:
        """Returns the network of the velocity."""
        o = self.options
        size = o.channels if len(self.data_shape) == 3 else o.width
        return velocity_network(self.data_shape, self.num_classes, size, o.blocks, o.octaves)
