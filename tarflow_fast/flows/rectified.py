"""Rectified flow: flow matching, and again on pairs that the flow itself made (Liu et al., 2023, arXiv 2209.03003)."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checks import Labels, check_count
from .flow_matching import FlowMatching
from .ode import integrate


class RectifiedFlow(FlowMatching):
    """min_v E ‖v(x_t, t) − (x₁ − x₀)‖², where x₁ is first data, and then what the ODE of the stage before made of x₀.

    Each such stage, a reflow, makes trajectories straighter at no greater transport cost, so that one step or a few of
    Euler's method suffice. A run of training is shared out equally: data first, then `reflows` reflows.
    """

    @dataclass(frozen=True)
    class Options(FlowMatching.Options):
        """The options of rectified flow, beside those of flow matching.

        Attributes:
            reflows: How many reflows a run of training has.
            pairs: How many pairs of noise and generated data a reflow is trained on. They are made a batch at a time,
                in its first steps.
        """

        reflows: int = 1
        pairs: int = 16384

        def __post_init__(self) -> None:
            super().__post_init__()
            check_count("reflows", self.reflows, low=0)
            check_count("pairs", self.pairs)

    options: Options
    stage: Tensor

    def __init__(self, data_shape: tuple[int, ...], num_classes: int = 0, options: Options | None = None):
        super().__init__(data_shape, num_classes, options)
        self.teacher = frozen(self.velocity)
        self.register_buffer("stage", torch.zeros((), dtype=torch.int64))
        self._pairs: list[Tensor] | None = None  # noise, data and, if there are any, classes

    def at_step(self, step: int, steps: int) -> None:
        """Begins a reflow where its share of the run begins. step: of `steps`, counted from 0."""
        due = min(step * (self.options.reflows + 1) // steps, self.options.reflows)
        while int(self.stage) < due:
            self.reflow()

    def reflow(self) -> None:
        """Ends a stage: from now on `loss` trains on pairs that the present velocity makes."""
        self.teacher.load_state_dict(self.velocity.state_dict())
        self.stage += 1
        self._pairs = None

    def loss(self, x: Tensor, y: Labels = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Returns the mean square of v − (x₁ − x₀) over a batch, of data or, in a reflow, of pairs that were made.

        x: (B, *data_shape); in a reflow only their number matters. y: labels as in `log_prob`, by which pairs are made.
        generator: what noise, times and pairs come from.
        """
        if int(self.stage) == 0:
            return super().loss(x, y, generator=generator)
        x = self.check_data(x, finite=False)
        context = self.context(y, len(x))
        if self._pairs is None or len(self._pairs[0]) < self.options.pairs:
            made = self._make_pairs(x, context, generator)
            self._pairs = (
                made if self._pairs is None else [torch.cat(both) for both in zip(self._pairs, made, strict=True)]
            )
        chosen = torch.randint(len(self._pairs[0]), (len(x),), generator=generator, device=x.device)
        z, x, *given = (part[chosen] for part in self._pairs)
        return self.regression(z, x, given[0] if given else None, generator)

    @torch.no_grad()
    def _make_pairs(self, x: Tensor, context: Tensor | None, generator: torch.Generator | None) -> list[Tensor]:
        """Returns noise in the shape of x, what the teacher's ODE makes of it and, if there are any, the classes."""
        z = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        (made,), _ = integrate(lambda t, state: (self.teacher(state[0], t, context),), (z,), 0.0, 1.0, self.ode)
        return [z, made] if context is None else [z, made, context]


def frozen(module: nn.Module) -> nn.Module:
    """Returns a copy of a module whose parameters are buffers: a state dict has them, and an optimiser has not."""
    module = copy.deepcopy(module)
    for part in module.modules():
        for name in list(part._parameters):
            weight = part._parameters.pop(name)
            part.register_buffer(name, None if weight is None else weight.detach())
    return module
