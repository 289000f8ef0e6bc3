"""The periodic features of normflows: some inputs x of a network are w₁ sin(s x) + w₂ cos(s x) instead."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from normflows.utils.nn import PeriodicFeaturesElementwise
from torch import Tensor, nn

from ..masked import Activation, Layer
from .made import unknown


def periodic(first: Layer, features: Any, name: str, place: Tensor) -> list[Layer]:
    """Returns two layers that are the first layer of a network after periodic features.

    The features are a sin(s x + φ) with a = √(w₁² + w₂²) and φ = arg(w₁ + i w₂): one layer reads those, the other one
    all other dimensions, and adds what the first has.

    Args:
        first: The layer, which reads x.
        features: The `PeriodicFeaturesElementwise`.
        name: Where in the model it is, for errors.
        place: (I,) int64, the dimension that each of the network's inputs is.

    Raises:
        ArgumentError: They are other features, or have an activation.
    """
    if type(features) is not PeriodicFeaturesElementwise:
        raise unknown(name, features)
    if type(features.activation) is not nn.Identity:
        raise unknown(f"{name}.activation", features.activation)
    at = place[features.ind]
    ones = first.weight.new_ones(first.inputs)

    def spread(values: Any) -> Tensor:
        return torch.zeros_like(ones).index_copy(0, at, values * ones[: len(at)])

    circular = spread(1.0).bool()
    w1, w2 = features.weights.unbind(1)
    bias = first.weight.new_zeros(first.outputs) if first.bias is None else first.bias
    if features.apply_bias:
        bias = bias + first.weight @ spread(features.bias)
    return [
        replace(
            first,
            weight=first.weight * spread(torch.hypot(w1, w2)),
            mask=first.mask & circular,
            bias=bias,
            activation=Activation("sin"),
            scale=spread(features.scale),
            shift=spread(torch.atan2(w2, w1)),
        ),
        Layer(first.weight * ~circular, first.mask & ~circular, add=1),
    ]
