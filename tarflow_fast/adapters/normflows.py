"""This module accelerates normflows' models."""

from __future__ import annotations

from typing import Any

from normflows import ConditionalNormalizingFlow, NormalizingFlow
from normflows.flows import Flow
from torch import Tensor, nn

from ..errors import ArgumentError
from ..masked import Order
from ..scalars import check_flag
from .both_ways import BothWays, check_context, check_options
from .normflows_steps import context_of, describe


def accelerate(
    model: nn.Module, *, check: bool = True, **options: Any
) -> FastNormalizingFlow | FastConditionalNormalizingFlow:
    """Returns a fast counterpart of a normflows model: the same distribution, to rounding.

    All methods are those of the library's own class, over one layer that has both directions of all the model's; among
    them are `sample(n)`, which returns samples with their log q, and `log_prob`. Autograd records the model's own
    weights as they are then; under `torch.no_grad()`, which is faster, methods take the copy that was made last.

    Args:
        model: A `NormalizingFlow` or a `ConditionalNormalizingFlow`; in eval mode, where it has batch norm or dropout.
        check: Whether small density passes of both are compared.
        **options: The keyword arguments of `FlowInverse`.

    Raises:
        ArgumentError: The model has a layer or a network that no engine knows, which the error names; or `check` found
            that it computes another thing; or an option is wrong.
        BackendError: The backend that was asked for cannot serve.
    """
    kinds: dict[type, type] = {
        NormalizingFlow: FastNormalizingFlow,
        ConditionalNormalizingFlow: FastConditionalNormalizingFlow,
    }
    if type(model) not in kinds:
        expected = "a NormalizingFlow or a ConditionalNormalizingFlow"
        raise ArgumentError("model", expected, type(model).__name__)
    check_options(options)
    fast = kinds[type(model)](model, **options)
    if check_flag("check", check):
        fast.check()
    return fast


class _Fast:
    """What is common to fast models.

    Args:
        model: The model, whose base and target distributions are shared.
        **options: The keyword arguments of `FlowInverse`.
    """

    def __init__(self, model: Any, **options: Any):
        super().__init__(model.q0, [_FastLayer(model.flows, **options)], model.p)  # type: ignore[call-arg]
        self._layer: _FastLayer = self.flows[0]  # type: ignore[attr-defined]

    @property
    def passes(self) -> tuple[int, ...]:
        """Returns how many passes each transform took in the last call, see `FlowInverse.passes`."""
        return tuple(self._layer.both.inverse.passes)

    def refresh(self) -> None:
        """Take the model's weights as they are now."""
        self._layer.both.refresh()

    def check(self) -> None:
        """Hold small density passes against the model's own. Raises ArgumentError where they differ."""
        both, (own,) = self._layer.both, self._layer.own

        def to_latents(x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
            total = x.new_zeros(len(x))
            given = {} if context is None else {"context": context}
            layers: list[Any] = list(own)
            for layer in reversed(layers):
                x, log_det = layer.inverse(x, **given)
                total = total + log_det
            return x, total

        both.check(to_latents, both.inverse.flow.features, context_of(own))


class FastNormalizingFlow(_Fast, NormalizingFlow):
    """A normflows `NormalizingFlow` whose slow direction evaluates each unit of its networks once."""


class FastConditionalNormalizingFlow(_Fast, ConditionalNormalizingFlow):
    """A normflows `ConditionalNormalizingFlow` whose slow direction evaluates each unit of its networks once."""


class _FastLayer(Flow):
    """A normflows layer by engines; it registers no weights, which stay those of the model's own layers."""

    def __init__(self, own: nn.ModuleList, **options: Any):
        super().__init__()
        orders: dict[str, Order] = {}
        self.own = (own,)  # in a tuple it is no module of this one
        self.context = context_of(own)
        self.both = BothWays(lambda: describe(own, orders), own.parameters, **options)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns data, (B, D), and log|det dx/dz|, (B,). z: (B, D). context: (B, C), or None."""
        check_context(context, self.context)
        return self.both.to_data(z, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns latents, (B, D), and log|det dz/dx|, (B,). z: (B, D), data. context: (B, C), or None."""
        check_context(context, self.context)
        return self.both.to_latents(z, context)
