"""nflows' coupling transforms, affine and rational-quadratic, whose networks are residual."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from nflows import transforms as nt
from nflows.nn.nets import resnet
from torch import nn
from torch.nn import functional as F

from ..masked import Activation, Affine, Layer, MaskedTransform, Order, Shift, Univariate
from ..spline import SplineLaw
from .made import Network, Style, unknown
from .rational_quadratic import spline_of

ResidualNet = resnet.ResidualNet
STYLE = Style(resnet, nn.Linear, first=False, gated=True)
SPLINE = nt.PiecewiseRationalQuadraticCouplingTransform
COUPLINGS = (nt.AffineCouplingTransform, nt.AdditiveCouplingTransform, SPLINE)


def coupling(module: Any, name: str, known: Order | None) -> MaskedTransform:
    """Returns the description of a coupling transform.

    Args:
        module: The transform.
        name: Where in the flow it is, for errors.
        known: Its order, if it was read off before.

    Raises:
        ArgumentError: Its network or what it does to the other half is unknown; the error names it.
    """
    net = module.transform_net
    if type(net) is not ResidualNet:
        raise unknown(f"{name}.transform_net", net, "a network that engines know")
    if module.unconditional_transform is not None:
        raise unknown(f"{name}.unconditional_transform", module.unconditional_transform, "None")
    network = Network(STYLE, net.context_features is not None)
    first = net.initial_layer
    if type(first) is not nn.Linear:
        raise unknown(f"{name}.transform_net.initial_layer", first)
    own = len(module.identity_features)
    place = module.identity_features
    weight = first.weight.new_zeros(first.out_features, module.features).index_copy(1, place, first.weight[:, :own])
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask[:, place] = True
    offset = partial(F.linear, weight=first.weight[:, own:].clone()) if network.conditional else None
    network.layers.append(Layer(weight, mask, first.bias.clone(), offset=offset))
    for i, block in enumerate(net.blocks):
        if type(block) is not resnet.ResidualBlock:
            raise unknown(f"{name}.transform_net.blocks.{i}", block)
        network.add_residual(block, f"{name}.transform_net.blocks.{i}")
    network.add(net.final_layer, f"{name}.transform_net.final_layer", Activation())
    univariate: Univariate = Shift()
    if type(module) is SPLINE:
        univariate = spline_of(SplineLaw.nflows, module, name, net.hidden_features)
    elif type(module) is nt.AffineCouplingTransform:
        univariate = Affine("sigmoid", 1e-3)
        last, count = network.layers[-1], len(module.transform_features)
        rows = torch.arange(2 * count).view(2, count).T.flatten()  # all shifts come first, then all scales
        bias = None if last.bias is None else last.bias[rows]
        network.layers[-1] = Layer(last.weight[rows], last.mask[rows], bias, last.source)
    return MaskedTransform(
        features=module.features,
        layers=tuple(network.layers),
        univariate=univariate,
        dims=tuple(module.transform_features.tolist()),
        name=name,
        known=known,
    )
