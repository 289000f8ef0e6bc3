"""This module accelerates zuko's flows."""

from __future__ import annotations

from typing import Any

import torch
import zuko
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from ..errors import ArgumentError
from ..masked import MaskedTransform, Order
from ..scalars import check_flag
from .both_ways import BothWays, check_options
from .certificate import Certificate
from .zuko_steps import context_of, describe


def accelerate(flow: nn.Module, *, check: bool = True, **options: Any) -> FastFlow:
    """Returns a fast counterpart of a zuko flow: `fast(c)` is the distribution that `flow(c)` is, to rounding.

    Args:
        flow: The flow.
        check: Whether small density passes of both are compared.
        **options: The keyword arguments of `FlowInverse`.

    Raises:
        ArgumentError: The flow has a transform or a network that no engine knows, which the error names; or `check`
            found that it computes another thing; or an option is wrong.
        BackendError: The backend that was asked for cannot serve.
    """
    if not isinstance(flow, zuko.lazy.Flow):
        raise ArgumentError("model", "a zuko.lazy.Flow", type(flow).__name__)
    check_options(options)
    fast = FastFlow(flow, **options)
    if check_flag("check", check):
        fast.check()
    return fast


class FastFlow:
    """A zuko flow whose inverse evaluates each unit of its networks once.

    Args:
        flow: The flow. Its weights are copied, and `refresh` copies them again; where autograd records, as `rsample`
            does for training, the flow's own weights as they are then are used, so that gradients reach them.
        **options: The keyword arguments of `FlowInverse`.
    """

    def __init__(self, flow: Any, **options: Any):
        self.flow = flow
        self._orders: dict[str, Order] = {}
        self._both = BothWays(lambda: describe(flow, self._orders), flow.parameters, **options)

    @property
    def passes(self) -> tuple[int, ...]:
        """Returns how many passes each transform took in the last call, see `FlowInverse.passes`."""
        return tuple(self._both.inverse.passes)

    def refresh(self) -> None:
        """Take the flow's weights as they are now."""
        self._both.refresh()

    def check(self) -> None:
        """Hold small density passes against the flow's own. Raises ArgumentError where they differ."""
        masked = next(step for step in self._both.inverse.flow.steps if isinstance(step, MaskedTransform))

        def own(x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
            z, log_det = self.flow.transform(context).call_and_ladj(x)
            return z, log_det

        self._both.check(own, masked.features, context_of(self.flow))

    def __call__(self, c: Tensor | None = None) -> FastDistribution:
        """Returns the distribution p(x | c).

        Args:
            c: (…, C), the context, or None.
        """
        own = self.flow(c)
        return FastDistribution(_FastTransform(self._both, c), own.base, own.transform)


class FastDistribution(zuko.distributions.NormalizingFlow):
    """A zuko `NormalizingFlow` with a fast inverse; `sample`, `rsample` and `log_prob` are as there.

    Args:
        transform: The fast transform.
        base: The base distribution.
        own: The flow's own transform, against which certificates are made.
    """

    def __init__(self, transform: _FastTransform, base: Any, own: Any):
        super().__init__(transform, base)
        self._own = own

    @torch.no_grad()
    def certified_sample(self, shape: torch.Size | tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Certificate]:
        """Returns samples, their log q in nats, and a certificate of both by the flow's own density pass.

        Args:
            shape: The shape of the samples, as in `sample`.
        """
        z = self.base.sample(torch.Size(shape))
        x, log_det = self.transform.inv.call_and_ladj(z)
        log_prob = self.base.log_prob(z) - log_det
        again, own_log_det = self._own.call_and_ladj(x)
        error = (self.base.log_prob(again) + own_log_det - log_prob).abs()
        return x, log_prob, Certificate((again - z).abs().amax(-1), error)


class _FastTransform(Transform):
    """The transform of a flow from data to latents, for a context."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, both: BothWays, context: Tensor | None, inverted: bool = False):
        super().__init__()
        self._both, self._context, self._inverted = both, context, inverted

    @property
    def inv(self) -> _FastTransform:
        """Returns the transform from latents to data."""
        return _FastTransform(self._both, self._context, not self._inverted)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the image of x, (…, D), and log|det| of the map, (…)."""
        return (self._both.to_data if self._inverted else self._both.to_latents)(x, self._context)

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.inv(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns log|det| of the map at x, (…)."""
        return self.call_and_ladj(x)[1]
