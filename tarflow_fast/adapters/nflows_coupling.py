"""nflows' coupling transforms, affine and rational-quadratic, whose networks are residual."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from nflows import transforms as nt
from nflows.nn.nets import resnet
from nflows.transforms.nonlinearities import PiecewiseRationalQuadraticCDF
from torch import nn

from ..masked import Affine, Layer, MaskedTransform, Shift
from ..spline import SplineLaw
from .coupling import Orders, residual_layers, spline_coupling, transform_of
from .made import Style, unknown

ResidualNet = resnet.ResidualNet
STYLE = Style(resnet, nn.Linear, first=False, gated=True)
SPLINE = nt.PiecewiseRationalQuadraticCouplingTransform
COUPLINGS = (nt.AffineCouplingTransform, nt.AdditiveCouplingTransform, SPLINE)


def coupling(module: Any, name: str, orders: Orders) -> Iterator[MaskedTransform]:
    """Yields the steps of a coupling transform, from data to latents.

    Args:
        module: The transform.
        name: Where in the flow it is, for errors.
        orders: The orders of transforms by their names, to which new ones are added.

    Raises:
        ArgumentError: Its network or what it does to the other half is unknown; the error names it.
    """
    if type(module) is SPLINE:
        yield from spline_coupling(module, name, STYLE, SplineLaw.nflows, PiecewiseRationalQuadraticCDF, orders)
        return
    if module.unconditional_transform is not None:
        raise unknown(f"{name}.unconditional_transform", module.unconditional_transform, "None")
    layers = residual_layers(module, name, STYLE)
    if type(module) is nt.AdditiveCouplingTransform:
        yield transform_of(module, layers, Shift(), name, orders)
        return
    last, count = layers[-1], len(module.transform_features)
    rows = torch.arange(2 * count).view(2, count).T.flatten()  # all shifts come first, then all scales
    bias = None if last.bias is None else last.bias[rows]
    layers[-1] = Layer(last.weight[rows], last.mask[rows], bias, last.source)
    yield transform_of(module, layers, Affine("sigmoid", 1e-3), name, orders)
