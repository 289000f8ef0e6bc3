"""The steps of zuko's flows: MAF, NSF, NICE and what else is made of the same transforms."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from zuko import lazy
from zuko import nn as zn
from zuko import transforms as zt
from zuko.flows.autoregressive import MaskedAutoregressiveTransform
from zuko.flows.coupling import GeneralCouplingTransform
from zuko.flows.gaussianization import ElementWiseTransform
from zuko.flows.spline import CircularRQSTransform
from zuko.nn import MLP, MaskedMLP

from ..errors import ArgumentError
from ..masked import (
    Activation,
    Affine,
    Elementwise,
    Fixed,
    Layer,
    Linear,
    MaskedFlow,
    MaskedTransform,
    Order,
    Permute,
    Reverse,
    Scale,
    Shift,
    Spline,
    Term,
    Univariate,
)
from ..masked.flow import Step
from ..spline import SplineLaw
from .activations import activation_of
from .zuko_spline import FusedRQSTransform

Orders = dict[str, Order]


def describe(flow: Any, orders: Orders | None = None) -> MaskedFlow:
    """Returns the description of a zuko flow, whose tensors autograd traces to the flow's own weights.

    Args:
        flow: A `zuko.lazy.Flow`.
        orders: The orders of its transforms by their names, which are read off the masks where they are not there yet,
            and added.

    Raises:
        ArgumentError: The flow has a transform or a network that no engine knows; the error names it.
    """
    orders = {} if orders is None else orders
    steps = tuple(_steps(flow.transform, "transform", orders))
    masked = [step for step in steps if isinstance(step, MaskedTransform)]
    if not masked:
        raise ArgumentError("flow", "one with an autoregressive or coupling transform", type(flow).__name__)
    return MaskedFlow(masked[0].features, steps)


def context_of(flow: Any) -> int:
    """Returns C, the number of context features that the networks of a flow read, or 0. flow: one that is described."""
    for module in flow.modules():
        if isinstance(module, ElementWiseTransform) and hasattr(module, "hyper"):
            return int(module.hyper.in_features)
        own = 0
        if isinstance(module, MaskedAutoregressiveTransform):
            own = module.hyper.out_features // module.total
        elif isinstance(module, GeneralCouplingTransform):
            own = int(module.mask.sum())
        if own:
            return int(module.hyper.in_features) - own
    return 0


def _unknown(name: str, module: object) -> ArgumentError:
    return ArgumentError(f"layer {name!r}", "a transform or network that engines know", type(module).__name__)


def _steps(module: Any, name: str, orders: Orders) -> Iterator[Step]:
    """Yields the steps of a lazy transform from data to latents. name: where in the flow it is."""
    kind = type(module)
    if kind is lazy.LazyComposedTransform:
        for i, each in enumerate(module.transforms):
            yield from _steps(each, f"{name}.transforms.{i}", orders)
    elif kind is lazy.LazyInverse:
        for step in reversed(list(_steps(module.transform, f"{name}.transform", orders))):
            yield step.inverted_copy() if isinstance(step, MaskedTransform) else Reverse.of(step)
    elif kind is MaskedAutoregressiveTransform:
        yield from _masked(module, name, orders)
    elif kind is GeneralCouplingTransform:
        yield _coupling(module, name, orders)
    elif kind is ElementWiseTransform:
        yield _elementwise(module, name, orders)
    elif kind in (lazy.UnconditionalTransform, lazy.Unconditional):
        yield _fixed(module(), name)
    else:
        raise _unknown(name, module)


def _fixed(transform: Any, name: str) -> Fixed:
    """Returns the step of a zuko transform that no network conditions."""
    kind = type(transform)
    if kind is zt.PermutationTransform and transform.order.dim() == 1:
        return Permute(tuple(transform.order.tolist()))
    if kind is zt.SoftclipTransform:
        return Elementwise("softclip", float(transform.bound))
    if kind is zt.RotationTransform and transform.R.dim() == 2:
        return Linear(transform.R)
    if kind is zt.LULinearTransform and transform.L.dim() == 2:
        return Linear(transform.L @ transform.U)
    if kind is torch.distributions.transforms.AffineTransform and all(
        isinstance(each, Tensor) and each.dim() == 1 for each in (transform.loc, transform.scale)
    ):
        return Scale(transform.scale.clone(), transform.loc.clone())
    if kind is torch.distributions.transforms.SigmoidTransform:
        return Elementwise("sigmoid")
    if kind is torch.distributions.transforms.ExpTransform:
        return Elementwise("exp")
    raise _unknown(name, transform)


def _constructor(module: Any) -> tuple[Any, dict[str, Any]]:
    """Returns what makes the univariate transforms of a lazy transform, and its keyword arguments."""
    constructor = module.univariate
    if isinstance(constructor, partial) and not constructor.args:
        return constructor.func, dict(constructor.keywords)
    return constructor, {}


def _univariate(module: Any, name: str) -> Univariate:
    """Returns the univariate transform of a lazy transform, by its constructor and the shapes of its parameters."""
    constructor, keywords = _constructor(module)
    shapes = [tuple(shape) for shape in module.shapes]
    if constructor is zt.MonotonicAffineTransform and shapes == [(), ()] and keywords.keys() <= {"slope"}:
        return Affine("softclip", float(keywords.get("slope", 1e-3)), shift_first=True)
    if constructor is zt.AdditiveTransform and shapes == [()] and not keywords:
        return Shift()
    if constructor is CircularRQSTransform and type(module) is MaskedAutoregressiveTransform:
        constructor, keywords = zt.MonotonicRQSTransform, {"bound": math.pi, **keywords}
    if (
        constructor in (zt.MonotonicRQSTransform, FusedRQSTransform)
        and len(shapes) == 3
        and keywords.keys() <= {"slope", "bound"}
    ):
        bins = shapes[0][0] if len(shapes[0]) == 1 else 0
        if bins and shapes == [(bins,), (bins,), (bins - 1,)]:
            return Spline(SplineLaw.zuko(bins, **keywords))
    raise ArgumentError(
        f"layer {name!r}",
        "a univariate transform that engines know: affine, additive or rational-quadratic spline",
        f"{getattr(constructor, '__name__', constructor)} with parameters of shapes {shapes}",
    )


class _Network:
    """The layers of a network of modules one after another, as they are added.

    Args:
        name: Where in the flow the network is.
        features: D, the number of dimensions of x.
        columns: For each input of the network the dimension of x that it is, or −1 for the context's.
    """

    def __init__(self, name: str, features: int, columns: list[int]):
        self.name, self.features = name, features
        self.own = [i for i, dim in enumerate(columns) if dim >= 0]
        self.dims = [dim for dim in columns if dim >= 0]
        self.of_context = [i for i, dim in enumerate(columns) if dim < 0]
        self.layers: list[Layer] = []
        self.activation: Activation | None = None

    def add_all(self, modules: Any, name: str) -> None:
        """Add modules one after another."""
        for i, module in enumerate(modules):
            here = f"{name}.{i}"
            if type(module) is zn.Residual:
                if self.activation is not None:
                    raise _unknown(here, module)
                start = len(self.layers)
                self.add_all(module, here)
                last = self.layers[-1]
                self.layers[-1] = Layer(**{**vars(last), "add": start})
            elif type(module) is zn.MaskedLinear:
                self.add_linear(module.mask * module.weight, module.mask, module.bias)
            elif type(module) in (zn.Linear, nn.Linear) and module.weight.dim() == 2:
                self.add_linear(module.weight, torch.ones_like(module.weight, dtype=torch.bool), module.bias)
            elif self.activation is None and (activation := activation_of(module)) is not None:
                self.activation = activation
            else:
                raise _unknown(here, module)

    def add_linear(self, weight: Tensor, mask: Tensor, bias: Tensor | None) -> None:
        """Add a linear layer, of which the first has the context among its inputs."""
        offset: Term | None = None
        if not self.layers:
            if self.of_context:
                offset = Term(weight[:, self.of_context])
            weight, mask = (self._spread(each) for each in (weight, mask))
        activation = self.activation or Activation()
        self.activation = None
        self.layers.append(Layer(weight, mask, bias, len(self.layers), activation, offset=offset))

    def _spread(self, columns: Tensor) -> Tensor:
        """Returns the columns of the network's own inputs where those of x are, (O, D)."""
        spread = columns.new_zeros(len(columns), self.features)
        return spread.index_copy(1, torch.tensor(self.dims, device=columns.device), columns[:, self.own])


def _finished(network: _Network, module: Any, name: str, orders: Orders, dims: list[int]) -> MaskedTransform:
    if network.activation is not None:
        raise ArgumentError(f"layer {name!r}", "a network that ends with a linear layer", network.activation.name)
    transform = MaskedTransform(
        features=network.features,
        layers=tuple(network.layers),
        univariate=_univariate(module, name),
        dims=tuple(dims),
        name=name,
        known=orders.get(name),
    )
    orders[name] = transform.order
    return transform


def _masked(module: Any, name: str, orders: Orders) -> Iterator[Step]:
    """Yields the steps of zuko's MaskedAutoregressiveTransform: of a circular spline, first the turn half around."""
    hyper = module.hyper
    if type(hyper) is not MaskedMLP:
        raise _unknown(f"{name}.hyper", hyper)
    features = hyper.out_features // module.total
    network = _Network(name, features, [*range(features), *[-1] * (hyper.in_features - features)])
    network.add_all(hyper, f"{name}.hyper")
    if _constructor(module)[0] is CircularRQSTransform:
        yield Elementwise("wrap", math.pi)
        network.layers[0] = replace(network.layers[0], activation=Activation("wrap", math.pi))  # which turns back
    yield _finished(network, module, name, orders, list(range(features)))


def _coupling(module: Any, name: str, orders: Orders) -> MaskedTransform:
    """Returns zuko's GeneralCouplingTransform, which transforms the dimensions where its mask is false."""
    if type(module.hyper) is not MLP:
        raise _unknown(f"{name}.hyper", module.hyper)
    mask = module.mask.tolist()
    given = [i for i, one in enumerate(mask) if one]
    network = _Network(name, len(mask), [*given, *[-1] * (module.hyper.in_features - len(given))])
    network.add_all(module.hyper, f"{name}.hyper")
    return _finished(network, module, name, orders, [i for i, one in enumerate(mask) if not one])


def _elementwise(module: Any, name: str, orders: Orders) -> MaskedTransform:
    """Returns zuko's ElementWiseTransform, whose parameters are constants, or depend on the context alone."""
    bias: Tensor | None = None
    offset: Term | None = None
    if hasattr(module, "phi"):
        bias = torch.cat([p.reshape(len(p), -1) for p in module.phi], 1).flatten()
        outputs, like = len(bias), bias
    elif type(module.hyper) is MLP:
        *hidden, last = module.hyper
        before = nn.Sequential(*hidden)
        copied = {key: weight.clone() for key, weight in before.named_parameters()}
        outputs, like = module.hyper.out_features, last.weight
        final = None if last.bias is None else last.bias.clone()
        offset = Term(like.clone(), final, before=partial(functional_call, before, copied))
    else:
        raise _unknown(f"{name}.hyper", module.hyper)
    features = outputs // module.total
    weight = like.new_zeros(outputs, features)
    network = _Network(name, features, list(range(features)))
    network.layers = [Layer(weight, weight.bool(), bias, offset=offset)]
    return _finished(network, module, name, orders, list(range(features)))
