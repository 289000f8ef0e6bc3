"""The steps of normflows' flows: masked autoregressive layers, affine or spline, and what stands between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from normflows import flows as nf
from normflows.flows.neural_spline.autoregressive import MaskedPiecewiseRationalQuadraticAutoregressive
from normflows.nets import made as made_module
from torch import nn

from ..errors import ArgumentError
from ..masked import Affine, Linear, MaskedFlow, MaskedTransform, Order, Permute, Reverse, Scale, Spline, Univariate
from ..masked.flow import Step
from ..spline import SplineLaw
from .made import Style, made_layers, unknown
from .normflows_coupling import COUPLINGS, ResidualNet, coupling
from .periodic import periodic
from .rational_quadratic import spline_of, tied

Orders = dict[str, Order]
STYLE = Style(made_module, made_module.MaskedLinear, first=False, gated=True, features=periodic)


def describe(flows: nn.ModuleList, orders: Orders | None = None) -> MaskedFlow:
    """Returns the description of normflows' layers, whose tensors autograd traces to their weights.

    Args:
        flows: The `flows` of a model, from latents to data.
        orders: The orders of their masked transforms by their names, which are read off the masks where they are not
            there yet, and added.

    Raises:
        ArgumentError: There is a layer or a network that no engine knows, or one in training mode where that makes a
            difference; the error names it.
    """
    orders = {} if orders is None else orders
    steps = tuple(step for i in reversed(range(len(flows))) for step in _steps(flows[i], f"flows.{i}", orders))
    masked = [step for step in steps if isinstance(step, MaskedTransform)]
    if not masked:
        expected = "one with a masked autoregressive or coupling layer, affine or rational-quadratic"
        raise ArgumentError("model", expected, f"layers {', '.join(type(flow).__name__ for flow in flows) or 'none'}")
    return MaskedFlow(masked[0].features, steps)


def _steps(flow: Any, name: str, orders: Orders) -> Iterator[Step]:
    """Yields the steps of a layer from data to latents, as its `inverse` goes. name: where in the model it is."""
    kind = type(flow)
    if kind is nf.Composite:
        for i in reversed(range(len(flow._flows))):
            yield from _steps(flow._flows[i], f"{name}._flows.{i}", orders)
    elif kind is nf.Reverse:
        for step in reversed(list(_steps(flow.flow, f"{name}.flow", orders))):
            yield step.inverted_copy() if isinstance(step, MaskedTransform) else Reverse.of(step)
    elif kind in (nf.AutoregressiveRationalQuadraticSpline, nf.CircularAutoregressiveRationalQuadraticSpline):
        yield _masked(flow.mprqat, f"{name}.mprqat", orders)
    elif kind in (nf.MaskedAffineAutoregressive, MaskedPiecewiseRationalQuadraticAutoregressive):
        yield _masked(flow, name, orders).inverted_copy()  # an inverse autoregressive flow: sampling is one pass
    elif kind in COUPLINGS:
        yield from coupling(flow, name, orders)
    elif kind is nf.Permute:
        yield Permute(_permutation(flow))
    elif kind is nf.LULinearPermute:
        yield Permute(tuple(flow.permutation._permutation.tolist()))
        yield Linear(flow.linear.weight().clone(), flow.linear.bias.clone())
    elif kind is nf.InvertibleAffine:
        yield Linear((flow._assemble_W() if flow.use_lu else flow.W.clone()).T)
    elif kind in (nf.ActNorm, nf.AffineConstFlow):
        if kind is nf.ActNorm and not flow.data_dep_init_done > 0:
            raise ArgumentError(f"layer {name!r}", "an ActNorm that has seen data", "one that is not initialised")
        if flow.s.dim() != 2:
            raise ArgumentError(f"layer {name!r}", "scales of vectors", f"scales of shape {tuple(flow.s.shape)}")
        scale = (-flow.s[0]).exp()
        yield Scale(scale, -flow.t[0] * scale)
    else:
        raise unknown(name, flow)


def _permutation(flow: Any) -> tuple[int, ...]:
    """Returns which latent each dimension is after the inverse of a `Permute`."""
    if flow.mode == "shuffle":
        return tuple(flow.inv_perm.tolist())
    half = (flow.num_channels + 1) // 2
    return (*range(half, flow.num_channels), *range(half))


def _masked(flow: Any, name: str, orders: Orders) -> MaskedTransform:
    """Returns the transform whose parallel direction is the layer's own `forward`."""
    features = flow.autoregressive_net.initial_layer.in_features
    layers, univariate = (
        made_layers(flow.autoregressive_net, f"{name}.autoregressive_net", STYLE),
        _univariate(flow, name),
    )
    if isinstance(univariate, Spline):
        layers = (*layers[:-1], tied(layers[-1], flow, univariate, features))
    masked = MaskedTransform(
        features=features,
        layers=layers,
        univariate=univariate,
        name=name,
        known=orders.get(name),
    )
    orders[name] = masked.order
    return masked


def _univariate(flow: Any, name: str) -> Univariate:
    if type(flow) is nf.MaskedAffineAutoregressive:
        return Affine("sigmoid", 1e-3, shift_first=False)
    if torch.is_tensor(flow.tail_bound) and flow.tail_bound.numel() > 1:
        raise ArgumentError(f"layer {name!r}", "one tail bound for all dimensions", tuple(flow.tail_bound.shape))
    return spline_of(SplineLaw.normflows, flow, name, getattr(flow.autoregressive_net, "hidden_features", 1))


def context_of(flows: Any) -> int:
    """Returns C, the number of context features that the networks read, or 0. flows: those that are described."""
    for module in flows.modules():
        if type(module) is made_module.MADE and isinstance(getattr(module, "context_layer", None), nn.Linear):
            return int(module.context_layer.in_features)
        if type(module) is ResidualNet:
            return int(module.context_features or 0)
    return 0
