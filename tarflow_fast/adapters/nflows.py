"""This module accelerates nflows' flows."""

from __future__ import annotations

from typing import Any

import torch
from nflows.flows import Flow
from nflows.transforms import Transform
from torch import Tensor, nn

from ..errors import ArgumentError
from ..masked import Order
from ..scalars import check_flag
from .both_ways import BothWays, check_context, check_options
from .nflows_steps import context_of, describe


def accelerate(flow: nn.Module, *, check: bool = True, **options: Any) -> FastFlow:
    """Returns a fast counterpart of an nflows flow: the same distribution, to rounding.

    Args:
        flow: The flow, an `nflows.flows.Flow`; in eval mode, where it has batch norm or dropout.
        check: Whether small density passes of both are compared.
        **options: The keyword arguments of `FlowInverse`.

    Raises:
        ArgumentError: The flow has a transform or a network that no engine knows, which the error names; or `check`
            found that it computes another thing; or an option is wrong.
        BackendError: The backend that was asked for cannot serve.
    """
    if not isinstance(flow, Flow):
        raise ArgumentError("model", "an nflows.flows.Flow", type(flow).__name__)
    check_options(options)
    fast = FastFlow(flow, **options)
    if check_flag("check", check):
        fast.check()
    return fast


class FastFlow(Flow):
    """An nflows `Flow` whose inverse evaluates each unit of its networks once.

    `log_prob`, `sample_and_log_prob` and `transform_to_noise` are as there. `sample` is too, but autograd never records
    it; in `sample_and_log_prob` and `log_prob` autograd records the flow's own weights as they are then. Under
    `torch.no_grad()`, which is faster, these too take the copy that was made last.

    Args:
        flow: The flow, whose base distribution and embedding network are shared.
        **options: The keyword arguments of `FlowInverse`.
    """

    def __init__(self, flow: Flow, **options: Any):
        super().__init__(_FastTransform(flow._transform, **options), flow._distribution, flow._embedding_net)

    @property
    def passes(self) -> tuple[int, ...]:
        """Returns how many passes each transform took in the last call, see `FlowInverse.passes`."""
        return tuple(self._transform.both.inverse.passes)

    def refresh(self) -> None:
        """Take the flow's weights as they are now."""
        self._transform.both.refresh()

    def check(self) -> None:
        """Hold small density passes against the flow's own. Raises ArgumentError where they differ."""
        both, own = self._transform.both, self._transform.own[0]
        both.check(own, both.inverse.flow.features, context_of(own))

    @torch.no_grad()
    def _sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        context = self._embedding_net(context)
        noise = self._distribution.sample(num_samples, context=context)
        return self._to_data(noise, context)[0]

    def sample_and_log_prob(self, num_samples: int, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns samples and their log q in nats.

        Args:
            num_samples: n, the number of samples for each context.
            context: (B, …), or None.

        Returns:
            (n, D) and (n,), or with a context (B, n, D) and (B, n).
        """
        context = self._embedding_net(context)
        noise, log_prob = self._distribution.sample_and_log_prob(num_samples, context=context)
        samples, log_det = self._to_data(noise, context)
        return samples, log_prob - log_det

    def _to_data(self, noise: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the data of noise, (n, D) or (B, n, D), and log|det dx/dz|. context: (B, C), or None."""
        return self._transform.inverse(noise, None if context is None else context[:, None])


class _FastTransform(Transform):
    """An nflows `Transform` by engines; it registers no weights, which stay those of the flow's own transform."""

    def __init__(self, own: Transform, **options: Any):
        super().__init__()
        orders: dict[str, Order] = {}
        self.own = (own,)  # in a tuple it is no module of this one
        self.context = context_of(own)
        self.both = BothWays(lambda: describe(own, orders), own.parameters, **options)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns latents, (…, D), and log|det dz/dx|, (…). inputs: (…, D). context: (…, C), or None."""
        check_context(context, self.context)
        return self.both.to_latents(inputs, context)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns data, (…, D), and log|det dx/dz|, (…). inputs: (…, D). context: (…, C), or None."""
        check_context(context, self.context)
        return self.both.to_data(inputs, context)
