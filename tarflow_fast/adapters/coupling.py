"""Coupling transforms whose networks are residual, as nflows and normflows have them, which are alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..masked import Activation, Layer, MaskedTransform, Order, Univariate
from ..spline import SplineLaw
from .made import Network, Style, unknown
from .rational_quadratic import spline_of, tied

Orders = dict[str, Order]


def spread(weight: Tensor, place: Tensor, features: int) -> tuple[Tensor, Tensor]:
    """Returns a weight, (O, I), where its inputs are among all dimensions, (O, D), and the mask of these columns.

    Args:
        weight: (O, I).
        place: (I,) int64, the dimension that each input is.
        features: D.
    """
    columns = weight.new_zeros(len(weight), features).index_copy(1, place, weight)
    mask = torch.zeros_like(columns, dtype=torch.bool)
    mask[:, place] = True
    return columns, mask


def residual_layers(module: Any, name: str, style: Style) -> list[Layer]:
    """Returns the layers of the residual network of a coupling transform.

    Args:
        module: The transform, whose `transform_net` reads its `identity_features`.
        name: Where in the model it is, for errors.
        style: The library that it is of; its parts are the module that has `ResidualNet`.

    Raises:
        ArgumentError: The network is of another kind, or has a layer that no engine knows; the error names it.
    """
    net, here = module.transform_net, f"{name}.transform_net"
    if type(net) is not style.parts.ResidualNet:
        raise unknown(here, net, "a network that engines know")
    first, own = net.initial_layer, len(module.identity_features)
    if type(first) is not nn.Linear:
        raise unknown(f"{here}.initial_layer", first)
    network = Network(style, net.context_features is not None)
    offset = partial(F.linear, weight=first.weight[:, own:].clone()) if network.conditional else None
    weight, mask = spread(first.weight[:, :own], module.identity_features, module.features)
    network.layers.append(Layer(weight, mask, first.bias.clone(), offset=offset))
    network.add_features(net, here, module.identity_features)
    for i, block in enumerate(net.blocks):
        if type(block) is not style.parts.ResidualBlock:
            raise unknown(f"{here}.blocks.{i}", block)
        network.add_residual(block, f"{here}.blocks.{i}")
    network.add(net.final_layer, f"{here}.final_layer", Activation())
    return network.layers


def transform_of(
    module: Any, layers: list[Layer], univariate: Univariate, name: str, orders: Orders
) -> MaskedTransform:
    """Returns the transform of the dimensions that a coupling does not pass unchanged.

    Args:
        module: The coupling.
        layers: Its network.
        univariate: What is done to each of these dimensions.
        name: Where in the model it is, for errors.
        orders: The orders of transforms by their names, to which its own is added.
    """
    made = MaskedTransform(
        features=module.features,
        layers=tuple(layers),
        univariate=univariate,
        dims=tuple(module.transform_features.tolist()),
        name=name,
        known=orders.get(name),
    )
    orders[name] = made.order
    return made


def spline_coupling(
    module: Any, name: str, style: Style, law: Callable[..., SplineLaw], cdf: type, orders: Orders
) -> Iterator[MaskedTransform]:
    """Yields the steps of a rational-quadratic coupling, from data to latents.

    Args:
        module: The coupling.
        name: Where in the model it is, for errors.
        style: The library that it is of.
        law: The library's law of splines, `SplineLaw.nflows` or `SplineLaw.normflows`.
        cdf: The library's class of splines whose parameters are constants, for the dimensions that are not coupled.
        orders: The orders of transforms by their names, to which new ones are added.

    Raises:
        ArgumentError: It has a part that no engine knows; the error names it.
    """
    univariate = spline_of(law, module, name, getattr(module.transform_net, "hidden_features", 1))
    layers = residual_layers(module, name, style)
    layers[-1] = tied(layers[-1], module, univariate, len(module.transform_features))
    yield transform_of(module, layers, univariate, name, orders)
    constant, here = module.unconditional_transform, f"{name}.unconditional_transform"
    if constant is None:
        return
    if type(constant) is not cdf:
        raise unknown(here, constant, "a rational-quadratic spline, or None")
    sizes = ("widths", "heights", "derivatives")
    values = torch.cat([getattr(constant, f"unnormalized_{each}") for each in sizes], -1).flatten()
    weight = values.new_zeros(len(values), module.features)
    univariate = spline_of(law, constant, here, 1, bins=module.num_bins)
    layer = tied(Layer(weight, weight.bool(), values), constant, univariate, len(module.identity_features))
    made = MaskedTransform(
        features=module.features,
        layers=(layer,),
        univariate=univariate,
        dims=tuple(module.identity_features.tolist()),
        name=here,
        known=orders.get(here),
    )
    orders[here] = made.order
    yield made
