"""The steps of nflows' flows: masked autoregressive transforms, affine or spline, and what stands between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from nflows import transforms as nt
from nflows.transforms import made as made_module
from nflows.transforms.permutations import Permutation
from nflows.transforms.standard import AffineTransform, IdentityTransform, PointwiseAffineTransform

from ..errors import ArgumentError
from ..masked import Affine, Linear, MaskedFlow, MaskedTransform, Order, Permute, Reverse, Scale, Univariate
from ..masked.flow import Step
from ..spline import SplineLaw
from .made import Style, made_layers, unknown
from .nflows_coupling import COUPLINGS, ResidualNet, coupling
from .rational_quadratic import spline_of

Orders = dict[str, Order]
STYLE = Style(made_module, made_module.MaskedLinear, first=True, gated=False)
AFFINE = nt.MaskedAffineAutoregressiveTransform
SPLINE = nt.MaskedPiecewiseRationalQuadraticAutoregressiveTransform


def describe(transform: Any, orders: Orders | None = None) -> MaskedFlow:
    """Returns the description of an nflows transform, whose tensors autograd traces to its weights.

    Args:
        transform: The `Transform` of a flow, from data to latents.
        orders: The orders of its masked transforms by their names, which are read off the masks where they are not
            there yet, and added.

    Raises:
        ArgumentError: There is a transform or a network that no engine knows, or one in training mode where that makes
            a difference; the error names it.
    """
    orders = {} if orders is None else orders
    modules = list(transform.modules())
    widths = [each.autoregressive_net.initial_layer.in_features for each in modules if type(each) in (AFFINE, SPLINE)]
    features = next(iter([*widths, *(each.features for each in modules if type(each) in COUPLINGS)]), None)
    if features is None:
        expected = "one with a masked autoregressive or coupling transform, affine or rational-quadratic"
        raise ArgumentError("model", expected, type(transform).__name__)
    return MaskedFlow(features, tuple(_steps(transform, "_transform", features, orders)))


def _steps(module: Any, name: str, features: int, orders: Orders) -> Iterator[Step]:
    """Yields the steps of a transform from data to latents. name: where in the flow it is."""
    kind = type(module)
    if kind is nt.CompositeTransform:
        for i, each in enumerate(module._transforms):
            yield from _steps(each, f"{name}._transforms.{i}", features, orders)
    elif kind is nt.InverseTransform:
        for step in reversed(list(_steps(module._transform, f"{name}._transform", features, orders))):
            yield step.inverted_copy() if isinstance(step, MaskedTransform) else Reverse.of(step)
    elif kind in (AFFINE, SPLINE):
        masked = MaskedTransform(
            features=features,
            layers=made_layers(module.autoregressive_net, f"{name}.autoregressive_net", STYLE),
            univariate=_univariate(module, name),
            name=name,
            known=orders.get(name),
        )
        orders[name] = masked.order
        yield masked
    elif kind in COUPLINGS:
        yield from coupling(module, name, orders)
    elif kind in (nt.RandomPermutation, nt.ReversePermutation, Permutation) and module._dim == 1:
        yield Permute(tuple(module._permutation.tolist()))
    elif kind is nt.LULinear:
        yield Linear(module.weight().clone(), module.bias.clone())
    elif kind is nt.BatchNorm:
        if module.training:
            expected = "batch norm in eval mode, as only that has an inverse; call .eval() on the model"
            raise ArgumentError(f"layer {name!r}", expected, "training mode")
        scale = module.weight / (module.running_var + module.eps).sqrt()
        yield Scale(scale, module.bias - module.running_mean * scale)
    elif kind is nt.ActNorm:
        if not module.initialized and module.training:
            raise ArgumentError(f"layer {name!r}", "an ActNorm that has seen data, or one in eval mode", "neither")
        yield Scale(module.scale, module.shift.clone())
    elif kind in (PointwiseAffineTransform, AffineTransform):
        ones = module._scale.new_ones(features)
        yield Scale(ones * module._scale, ones * module._shift)
    elif kind is not IdentityTransform:
        raise unknown(name, module, "a transform that engines know")


def _univariate(module: Any, name: str) -> Univariate:
    if type(module) is AFFINE:
        return Affine("softplus", module._epsilon, shift_first=False)
    return spline_of(SplineLaw.nflows, module, name, getattr(module.autoregressive_net, "hidden_features", 1))


def context_of(transform: Any) -> int:
    """Returns C, the number of context features that the networks read, or 0. transform: one that is described."""
    for module in transform.modules():
        if type(module) is made_module.MADE and isinstance(getattr(module, "context_layer", None), torch.nn.Linear):
            return int(module.context_layer.in_features)
        if type(module) is ResidualNet:
            return int(module.context_features or 0)
    return 0
