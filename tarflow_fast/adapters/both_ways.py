"""Both directions of another library's flow, for tensors of any batch shape."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..masked import MaskedFlow
from ..sampling.masked import FlowInverse, differentiable

Map = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]

OPTIONS = tuple(inspect.signature(FlowInverse).parameters)[1:]  # all but the flow

AGREE = 1e-3  # how far a flow's own pass and ours may be apart in fp32, at values of about 1


def check_options(options: dict[str, Any]) -> None:
    """Raises ArgumentError unless all of these are keyword arguments of `FlowInverse`."""
    for name in options.keys() - set(OPTIONS):
        raise ArgumentError("options", f"options of a flow's inverse, which are {', '.join(OPTIONS)}", repr(name))


def check_context(context: Tensor | None, features: int) -> None:
    """Raises ArgumentError unless this is a context of networks that read so many features, 0 for none."""
    found = 0 if context is None else context.shape[-1]
    if found != features:
        expected = f"a tensor with {features} features in the last dimension" if features else "None"
        raise ArgumentError("context", expected, None if context is None else tuple(context.shape))


class BothWays:
    """Both directions of a flow, by a snapshot of its weights, or, where autograd records, by the weights themselves.

    Args:
        describe: A function that describes the flow, with tensors that autograd traces to its weights.
        weights: A function that returns the flow's weights.
        **options: The keyword arguments of `FlowInverse`.
    """

    def __init__(self, describe: Callable[[], MaskedFlow], weights: Callable[[], Iterable[Tensor]], **options: Any):
        self._describe, self._weights, self._options = describe, weights, options
        self.refresh()

    def refresh(self) -> None:
        """Take the weights as they are now."""
        with torch.no_grad():
            self.inverse = FlowInverse(self._describe(), **self._options)

    def to_data(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the data of latents, (…, D), and log|det dx/dz|, (…), in nats.

        Args:
            z: (…, D).
            context: (…, C), whose batch shape is that of z or can be expanded to it, or None.
        """
        return self._run(z, context, to_latents=False)

    def to_latents(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the latents of data, (…, D), and log|det dz/dx|, (…), in nats.

        Args:
            x: (…, D).
            context: (…, C), whose batch shape is that of x or can be expanded to it, or None.
        """
        return self._run(x, context, to_latents=True)

    def recorded(self, *tensors: Tensor | None) -> bool:
        """Returns whether autograd is to record a pass over these tensors."""
        return torch.is_grad_enabled() and any(
            each is not None and each.requires_grad for each in (*tensors, *self._weights())
        )

    def _run(self, values: Tensor, context: Tensor | None, *, to_latents: bool) -> tuple[Tensor, Tensor]:
        if context is not None:
            shape = torch.broadcast_shapes(values.shape[:-1], context.shape[:-1])
            values = values.expand(*shape, values.shape[-1])
            if context.shape[:-1].numel() == 1:
                context = context.reshape(1, -1)
            else:
                context = context.expand(*shape, context.shape[-1]).reshape(-1, context.shape[-1])
        flat = values.reshape(-1, values.shape[-1])
        if self.recorded(values, context):
            out, log_det = differentiable(self._describe().steps, flat, context, to_latents=to_latents)
        else:
            out, log_det = (self.inverse.to_latents if to_latents else self.inverse.to_data)(flat, context)
        return out.reshape(values.shape), log_det.reshape(values.shape[:-1])

    def check(self, own: Map, features: int, context: int) -> None:
        """Hold small passes against the flow's own.

        Args:
            own: The flow's own map from data to latents with its log|det|.
            features: D.
            context: C, or 0 for none.

        Raises:
            ArgumentError: They differ.
        """
        generator = torch.Generator().manual_seed(0)

        def noise(count: int) -> Tensor:
            drawn = torch.randn(4, count, generator=generator, dtype=torch.float64)
            return drawn.to(self.inverse.device, self.inverse.dtype)

        x, c = noise(features), noise(context) if context else None
        with torch.no_grad():
            wanted, log_det = own(x, c)
            got, ours = self.to_latents(x, c)
        scale = 1 + wanted.abs().max() + log_det.abs().max()
        difference = torch.maximum((got - wanted).abs().max(), (ours - log_det).abs().max())
        if not difference <= AGREE * scale:
            expected = "one that computes what its layers say; pass check=False to take it all the same"
            raise ArgumentError("model", expected, f"latents or log-determinants that differ by {difference:.3g}")
