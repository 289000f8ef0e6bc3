"""Activations of torch, by the names under which engines know them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..masked import Activation

_MODULES: dict[type, str] = {
    nn.ReLU: "relu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu",
    nn.Identity: "identity",
}
_FUNCTIONS = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.tanh: "tanh",
    F.tanh: "tanh",
    torch.sigmoid: "sigmoid",
    F.silu: "silu",
}


def activation_of(activation: Any) -> Activation | None:
    """Returns the activation that a module or a function is, or None for one that engines do not know."""
    kind = type(activation)
    if kind in _MODULES:
        return Activation(_MODULES[kind])
    if kind is nn.ELU:
        return Activation("elu", activation.alpha)
    if kind is nn.LeakyReLU:
        return Activation("leaky_relu", activation.negative_slope)
    if kind is nn.GELU and activation.approximate == "none":
        return Activation("gelu")
    if kind is nn.Softplus and (activation.beta, activation.threshold) == (1, 20):
        return Activation("softplus")
    try:
        if activation in _FUNCTIONS:
            return Activation(_FUNCTIONS[activation])
    except TypeError:
        return None
    return {F.elu: Activation("elu"), F.leaky_relu: Activation("leaky_relu", 0.01), F.gelu: Activation("gelu")}.get(
        activation
    )
