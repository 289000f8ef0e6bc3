"""normflows' couplings: affine with a split or a mask, and rational-quadratic ones with residual networks."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from normflows import flows as nf
from normflows import nets
from normflows.flows.neural_spline.coupling import PiecewiseRationalQuadraticCDF, PiecewiseRationalQuadraticCoupling
from normflows.nets import resnet
from torch import Tensor, nn

from ..errors import ArgumentError
from ..masked import Activation, Affine, Layer, MaskedTransform, Shift, Univariate
from ..spline import SplineLaw
from .activations import activation_of
from .coupling import Orders, spline_coupling, spread, transform_of
from .made import Style, unknown
from .periodic import periodic

ResidualNet = resnet.ResidualNet
STYLE = Style(resnet, nn.Linear, first=False, gated=True, features=periodic)
WRAPPED = (nf.CoupledRationalQuadraticSpline, nf.CircularCoupledRationalQuadraticSpline)
SPLINES = (*WRAPPED, PiecewiseRationalQuadraticCoupling)
COUPLINGS = (*SPLINES, nf.AffineCouplingBlock, nf.MaskedAffineFlow)


def coupling(flow: Any, name: str, orders: Orders) -> Iterator[MaskedTransform]:
    """Yields the steps of a coupling from data to latents, as its `inverse` goes.

    Args:
        flow: The coupling, of one of the classes `COUPLINGS`.
        name: Where in the model it is, for errors.
        orders: The orders of transforms by their names, to which new ones are added.

    Raises:
        ArgumentError: It has a part that no engine knows; the error names it.
    """
    if type(flow) in SPLINES:
        wrapped = type(flow) in WRAPPED
        module, here = (flow.prqct, f"{name}.prqct") if wrapped else (flow, name)
        if torch.is_tensor(module.tail_bound) and module.tail_bound.numel() > 1:
            raise ArgumentError(f"layer {here!r}", "one tail bound for all dimensions", tuple(module.tail_bound.shape))
        steps = list(spline_coupling(module, here, STYLE, SplineLaw.normflows, PiecewiseRationalQuadraticCDF, orders))
        # The layer by itself goes from latents to data.
        yield from steps if wrapped else [step.inverted_copy() for step in reversed(steps)]
    elif type(flow) is nf.AffineCouplingBlock:
        yield _split(flow, name, orders).inverted_copy()
    else:
        yield _masked(flow, name, orders).inverted_copy()


def _split(flow: Any, name: str, orders: Orders) -> MaskedTransform:
    """Returns what an `AffineCouplingBlock` does to latents: it splits them, and transforms the second part."""
    split, inner, _ = flow.flows
    here = f"{name}.flows.1.param_map"
    given, outputs = _ends(inner.param_map, here)
    univariate: Univariate = Shift()
    if inner.scale:
        laws = {"exp": Affine("exp"), "sigmoid_inv": Affine("sigmoid", 0.0)}
        if inner.scale_map not in laws:
            raise ArgumentError(f"layer {name + '.flows.1'!r}", f"a scale map of {', '.join(laws)}", inner.scale_map)
        univariate = laws[inner.scale_map]
    D = given + outputs // univariate.parameters
    dims = {
        "channel": list(range(given)),
        "channel_inv": list(range(D - given, D)),
        "checkerboard": list(range(1, D, 2)),
        "checkerboard_inv": list(range(0, D, 2)),
    }[split.mode]
    module = _module(D, dims)
    return transform_of(module, _layers(inner.param_map, here, module, 0), univariate, name, orders)


def _masked(flow: Any, name: str, orders: Orders) -> MaskedTransform:
    """Returns what a `MaskedAffineFlow` does to latents: those where its mask is 0 are scaled by one network, and moved
    by another one."""
    mask = flow.b.flatten()
    if not ((mask == 0) | (mask == 1)).all():
        raise ArgumentError(f"layer {name!r}", "a mask of zeros and ones", "other values")
    module = _module(len(mask), torch.nonzero(mask)[:, 0].tolist())
    every = SimpleNamespace(features=module.features, identity_features=torch.arange(len(mask)))
    layers: list[Layer] = []
    dims = module.transform_features
    for row, net in enumerate((flow.t, flow.s)):  # the parameters of a dimension: its shift, then its log-scale
        if not isinstance(net, nn.Module):
            continue
        first = len(layers)
        layers += _layers(net, f"{name}.{'ts'[row]}", every, first)
        layers[first] = _only(layers[first], mask)
        last = layers[-1]
        rows = 2 * torch.arange(len(dims)) + row
        weight = last.weight.new_zeros(2 * len(dims), last.inputs).index_copy(0, rows, last.weight[dims])
        bias = last.weight.new_zeros(2 * len(dims))
        if last.bias is not None:
            bias = bias.index_copy(0, rows, last.bias[dims])
        mask_of = torch.zeros_like(weight, dtype=torch.bool)
        mask_of[rows] = last.mask[dims]
        layers[-1] = Layer(weight, mask_of, bias, last.source, last.activation, add=first or None)
    if not layers:
        weight = flow.b.new_zeros(2 * len(dims), len(mask))
        layers = [Layer(weight, weight.bool())]
    return transform_of(module, layers, Affine("exp"), name, orders)


def _module(features: int, given: list[int]) -> Any:
    """Returns what `transform_of` reads of a coupling. given: the dimensions that pass unchanged."""
    others = [i for i in range(features) if i not in set(given)]
    return SimpleNamespace(
        features=features, identity_features=torch.tensor(given), transform_features=torch.tensor(others)
    )


def _modules(net: Any, name: str) -> list[Any]:
    """Returns the modules of a multilayer perceptron, one after another."""
    if type(net) is nets.MLP:
        return list(net.net)
    if type(net) is nn.Sequential:
        return list(net)
    raise unknown(name, net, "a multilayer perceptron, nets.MLP or nn.Sequential")


def _ends(net: Any, name: str) -> tuple[int, int]:
    """Returns how many values a network takes, and how many it gives."""
    linear = [each for each in _modules(net, name) if type(each) is nn.Linear]
    if not linear:
        raise unknown(name, net, "a network with linear layers")
    return linear[0].in_features, linear[-1].out_features


def _only(layer: Layer, mask: Tensor) -> Layer:
    """Returns a first layer that reads the dimensions alone where a mask is 1."""
    return Layer(layer.weight * mask, layer.mask & mask.bool(), layer.bias, layer.source)


def _layers(net: Any, name: str, module: Any, start: int) -> list[Layer]:
    """Returns the layers of a multilayer perceptron.

    Args:
        net: The network.
        name: Where in the model it is, for errors.
        module: What it reads, see `_module`.
        start: The number of layers before it, none of which it reads.

    Raises:
        ArgumentError: It has a layer that no engine knows; the error names it.
    """
    layers: list[Layer] = []
    activation: Activation | None = None
    modules = _modules(net, name)
    for i, each in enumerate(modules):
        here = f"{name}.net.{i}" if type(net) is nets.MLP else f"{name}.{i}"
        found = activation_of(each)
        if type(each) is nn.Linear:
            weight, mask = each.weight.clone(), torch.ones_like(each.weight, dtype=torch.bool)
            if not layers:
                weight, mask = spread(weight, module.identity_features, module.features)
            bias = None if each.bias is None else each.bias.clone()
            source = start + len(layers) if layers else 0
            layers.append(Layer(weight, mask, bias, source, activation or Activation()))
            activation = None
        elif type(each) is nn.Dropout and not (each.training and each.p > 0):
            continue
        elif found is not None and activation is None and layers:
            activation = found
        else:
            raise unknown(here, each)
    if activation is not None:  # what follows the last layer
        eye = torch.eye(layers[-1].outputs).to(layers[-1].weight)
        layers.append(Layer(eye, eye.bool(), None, start + len(layers), activation))
    return layers
