"""The masked networks of nflows and normflows, `MADE`, which are alike but for where activations stand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ArgumentError
from ..masked import Activation, Layer
from .activations import activation_of

Term = Callable[[Tensor], Tensor]


class Style(NamedTuple):
    """A `Style` is what differs between libraries.

    parts: The library's module with the network and its parts. linear: The class of its linear layers. first: Whether
    the activation follows the first layer where blocks are not residual. gated: Whether the context of a residual block
    is a gate on what the block adds, the sigmoid of a linear map, rather than an addition to its first layer; without,
    the context of the network's first layer goes through the activation. features: The function that makes layers of
    the first one and of a module before it, whose name and whose inputs' dimensions it is given, or None.
    """

    parts: Any
    linear: Any
    first: bool
    gated: bool
    features: Callable[[Layer, Any, str, Tensor], list[Layer]] | None = None


def unknown(name: str, module: object, known: str = "a layer that engines know") -> ArgumentError:
    """Returns the error that names a layer which no engine knows."""
    return ArgumentError(f"layer {name!r}", known, type(module).__name__)


def _activation(activation: Any, name: str) -> Activation:
    found = activation_of(activation)
    if found is None:
        called = getattr(activation, "__name__", type(activation).__name__)
        raise ArgumentError(f"layer {name!r}", "an activation that engines know", called)
    return found


def _norm(norm: nn.BatchNorm1d, name: str) -> tuple[Tensor, Tensor]:
    """Returns scale and shift of a batch norm in eval mode."""
    if norm.training or norm.running_mean is None or norm.running_var is None:
        raise ArgumentError(f"layer {name!r}", "a batch norm in eval mode; call .eval() on the model", "training mode")
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return scale, norm.bias - norm.running_mean * scale


def _of_context(layer: nn.Linear, function: Term | None = None) -> Term:
    """Returns the function of the context that a linear layer, and then a function, is, with a copy of the weights."""
    weight, bias = layer.weight.clone(), None if layer.bias is None else layer.bias.clone()
    if function is None:
        return partial(F.linear, weight=weight, bias=bias)
    return lambda context: function(F.linear(context, weight, bias))


class Network:
    """The layers of a network as they are added. conditional: whether it reads a context."""

    def __init__(self, style: Style, conditional: bool):
        self.style, self.conditional = style, conditional
        self.layers: list[Layer] = []

    def add(self, linear: Any, name: str, activation: Activation, **terms: Any) -> int:
        """Add a masked linear layer after an activation of the value before; returns the number of its value."""
        if type(linear) is not self.style.linear:
            raise unknown(name, linear)
        mask = linear.mask if hasattr(linear, "mask") else torch.ones_like(linear.weight)
        bias = None if linear.bias is None else linear.bias.clone()
        weight, mask = linear.weight * mask, mask.bool()
        self.layers.append(Layer(weight, mask, bias, len(self.layers), activation, **terms))
        return len(self.layers)

    def add_features(self, net: Any, name: str, place: Tensor) -> None:
        """Put what is done to a network's inputs before its first layer. place: (I,), the dimension of each input."""
        features = getattr(net, "preprocessing", None)
        if features is None or type(features) is nn.Identity:
            return
        if self.style.features is None:
            raise unknown(f"{name}.preprocessing", features)
        self.layers = self.style.features(self.layers[0], features, f"{name}.preprocessing", place)

    def add_residual(self, block: Any, name: str) -> Activation:
        """Add v + W₂ act(norm₂(W₁ act(norm₁(v)))), with the context in its place; nothing follows it."""
        check_dropout(block, name)
        activation = _activation(block.activation, f"{name}.activation")
        norms: list[dict[str, Tensor]] = [{}, {}]
        if block.use_batch_norm:
            for i, norm in enumerate(block.batch_norm_layers):
                scale, shift = _norm(norm, f"{name}.batch_norm_layers.{i}")
                norms[i] = {"scale": scale, "shift": shift}
        first: dict[str, Term] = {}
        second: dict[str, Term] = {}
        if self.conditional and self.style.gated:
            second["gate"] = _of_context(block.context_layer, torch.sigmoid)
        elif self.conditional:
            first["offset"] = _of_context(block.context_layer)
        start = len(self.layers)
        self.add(block.linear_layers[0], f"{name}.linear_layers.0", activation, **norms[0], **first)
        self.add(block.linear_layers[1], f"{name}.linear_layers.1", activation, add=start, **norms[1], **second)
        return Activation()

    def add_feedforward(self, block: Any, name: str, before: Activation) -> Activation:
        """Add W norm(before(v)) + b, which the block's own activation follows."""
        check_dropout(block, name)
        self.add(block.linear, f"{name}.linear", before)
        if block.batch_norm is not None:  # it is after the activation, so that it goes into the layer
            scale, shift = _norm(block.batch_norm, f"{name}.batch_norm")
            layer = self.layers[-1]
            moved = layer.weight @ shift
            bias = moved if layer.bias is None else layer.bias + moved
            self.layers[-1] = Layer(layer.weight * scale, layer.mask, bias, layer.source, before)
        return _activation(block.activation, f"{name}.activation")


def check_dropout(block: Any, name: str) -> None:
    """Raises ArgumentError if values are dropped at random by this block."""
    if block.dropout.training and block.dropout.p > 0:
        raise ArgumentError(f"layer {name + '.dropout'!r}", "dropout in eval mode; call .eval()", "training mode")


def made_layers(made: Any, name: str, style: Style) -> tuple[Layer, ...]:
    """Returns the layers of a `MADE`: copies of its weights, to which autograd traces them.

    Args:
        made: The network.
        name: Where in the model it is, for errors.
        style: The library that it is of.

    Raises:
        ArgumentError: It has a layer that no engine knows, or is in training mode where that makes a difference; the
            error names the layer.
    """
    parts = style.parts
    if type(made) is not parts.MADE:
        raise unknown(name, made, "a masked network that engines know")
    network = Network(style, hasattr(made, "context_layer"))
    terms: dict[str, Term] = {}
    if network.conditional:
        function = None if style.gated else _activation(made.activation, f"{name}.activation")
        terms["offset"] = _of_context(made.context_layer, function)
    network.add(made.initial_layer, f"{name}.initial_layer", Activation(), **terms)
    network.add_features(made, name, torch.arange(network.layers[0].inputs))
    after = Activation()
    if style.first and not made.use_residual_blocks:
        after = _activation(made.activation, f"{name}.activation")
    for i, block in enumerate(made.blocks):
        here = f"{name}.blocks.{i}"
        if type(block) not in (parts.MaskedResidualBlock, parts.MaskedFeedforwardBlock):
            raise unknown(here, block)
        if type(block) is parts.MaskedResidualBlock:
            after = network.add_residual(block, here)
        else:
            after = network.add_feedforward(block, here, after)
    network.add(made.final_layer, f"{name}.final_layer", after)
    return tuple(network.layers)
