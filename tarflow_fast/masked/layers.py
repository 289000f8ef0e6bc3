"""The layers of a masked network: which units read which, and by what weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import check_choice
from ..errors import ArgumentError

ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda h, alpha: h,
    "relu": lambda h, alpha: F.relu(h),
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "tanh": lambda h, alpha: torch.tanh(h),
    "sigmoid": lambda h, alpha: torch.sigmoid(h),
    "silu": lambda h, alpha: F.silu(h),
    "softplus": lambda h, alpha: F.softplus(h),
    "gelu": lambda h, alpha: F.gelu(h),
    "sin": lambda h, alpha: torch.sin(h),
    "wrap": lambda h, alpha: torch.remainder(h, 2 * alpha) - alpha,
}
"""The activations by name, as functions of values and of alpha."""


@dataclass(frozen=True)
class Activation:
    """An activation.

    Attributes:
        name: One of `ACTIVATIONS`.
        alpha: The negative slope of "leaky_relu", the alpha of "elu", and the bound of "wrap", h modulo 2 alpha less
            alpha; no other has one.

    Raises:
        ArgumentError: The name is unknown.
    """

    name: str = "identity"
    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_choice("activation", self.name, tuple(ACTIVATIONS))

    def __call__(self, h: Tensor) -> Tensor:
        """Returns the activation of h, of its shape."""
        return ACTIVATIONS[self.name](h, self.alpha)


IDENTITY = Activation()


@dataclass(frozen=True)
class Layer:
    """A masked linear layer, h = (W · act(scale · v + shift) + b + offset(c)) · gate(c) + w.

    Values have numbers: value 0 is the input x, (…, D), and value l is the result of layer l, counted from 1. Each
    layer reads one of them, v, and may add another, w, to what it computes, as residual blocks do. The context c
    comes in by functions, whose results an engine computes once for a batch.

    Attributes:
        weight: (O, I), W, zero where masked.
        mask: (O, I) bool, where W may be other than zero; from it, and not from W, it is read which unit depends on
            which.
        bias: (O,), b, or None.
        source: The number of the value v.
        activation: act, applied to what is read.
        scale: (I,), such as of a batch norm in eval mode, or None for 1.
        shift: (I,), or None for 0.
        add: The number of the value w, or None where nothing is added.
        offset: A function of the context (…, C) that returns (…, O), or None.
        gate: A function of the context (…, C) that returns (…, O), or None for 1.

    Raises:
        ArgumentError: The tensors do not fit each other.
    """

    weight: Tensor
    mask: Tensor
    bias: Tensor | None = None
    source: int = 0
    activation: Activation = IDENTITY
    scale: Tensor | None = None
    shift: Tensor | None = None
    add: int | None = None
    offset: Callable[[Tensor], Tensor] | None = None
    gate: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.weight.dim() != 2 or self.mask.shape != self.weight.shape or self.mask.dtype != torch.bool:
            expected = f"a bool tensor of the weight's shape {tuple(self.weight.shape)}"
            raise ArgumentError("mask", expected, f"{self.mask.dtype} {tuple(self.mask.shape)}")
        for name, count in (("bias", self.outputs), ("scale", self.inputs), ("shift", self.inputs)):
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != (count,):
                raise ArgumentError(name, f"shape ({count},)", tuple(tensor.shape))

    @property
    def outputs(self) -> int:
        """Returns O, the number of units."""
        return self.weight.shape[0]

    @property
    def inputs(self) -> int:
        """Returns I, the number of units that are read."""
        return self.weight.shape[1]

    def read(self, v: Tensor) -> Tensor:
        """Returns act(scale · v + shift), (…, I). v: (…, I), the value that the layer reads."""
        if self.scale is not None:
            v = v * self.scale
        if self.shift is not None:
            v = v + self.shift
        return self.activation(v)

    def evaluate(self, values: Sequence[Tensor], context: Tensor | None) -> Tensor:
        """Returns the layer's result, (…, O).

        Args:
            values: The values so far, of which the first is x.
            context: (…, C), or None.

        Returns:
            The value of the layer, which is the next one.
        """
        h = F.linear(self.read(values[self.source]), self.weight, self.bias)
        if self.offset is not None:
            h = h + self.offset(context)  # type: ignore[arg-type]
        if self.gate is not None:
            h = h * self.gate(context)  # type: ignore[arg-type]
        return h if self.add is None else h + values[self.add]
