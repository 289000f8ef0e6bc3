"""Masked transforms at random: any order, masks with holes, several dimensions a step, residuals, norms, contexts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from tarflow_fast.masked import Activation, Affine, Layer, MaskedTransform, Shift, Spline, Term, Univariate
from tarflow_fast.masked.layers import ACTIVATIONS
from tarflow_fast.spline import SplineLaw

LAWS: dict[str, Univariate] = {
    "softclip": Affine("softclip"),
    "softplus": Affine("softplus", shift_first=False),
    "sigmoid": Affine("sigmoid", shift_first=False),
    "exp": Affine("exp"),
    "shift": Shift(),
    "spline": Spline(SplineLaw.zuko(4, 3.0)),
    "floor spline": Spline(SplineLaw.nflows(3, 2.0, divisor=2.0)),
}


@dataclass(frozen=True)
class Recipe:
    """What a random transform is made of.

    levels: for each dimension a number; it depends on dimensions of smaller ones. passed: how many of the dimensions
    pass unchanged. hidden: the width of the network. blocks: how many residual blocks it has. holes: the share of
    weights that are masked beside those that must be. context: C.
    """

    levels: tuple[int, ...]
    passed: int = 0
    hidden: int = 12
    blocks: int = 1
    holes: float = 0.2
    context: int = 0
    law: str = "softclip"
    activation: str = "relu"
    norm: bool = False
    gate: bool = False
    seed: int = 0


@st.composite
def recipes(draw: st.DrawFn, laws: tuple[str, ...] = tuple(LAWS)) -> Recipe:
    features = draw(st.integers(1, 9))
    return Recipe(
        levels=tuple(draw(st.lists(st.integers(0, 4), min_size=features, max_size=features))),
        passed=draw(st.integers(0, features - 1)),
        hidden=draw(st.integers(1, 20)),
        blocks=draw(st.integers(0, 2)),
        holes=draw(st.sampled_from([0.0, 0.3])),
        context=draw(st.integers(0, 2)),
        law=draw(st.sampled_from(laws)),
        activation=draw(st.sampled_from(list(ACTIVATIONS))),
        norm=draw(st.booleans()),
        gate=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


def transform_of(recipe: Recipe, dtype: torch.dtype = torch.float64) -> MaskedTransform:
    """Returns a transform with random weights. Units have degrees, of which they may read smaller or equal ones."""
    generator = torch.Generator().manual_seed(recipe.seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    levels = torch.tensor(recipe.levels)
    D, H, univariate = len(levels), recipe.hidden, LAWS[recipe.law]
    order = torch.randperm(D, generator=generator)
    passed = order[: recipe.passed]
    levels[passed] = -1  # these depend on none
    dims = sorted(order[recipe.passed :].tolist())
    degrees = torch.randint(-1, 5, (H,), generator=generator)
    columns = recipe.context and drawn(recipe.context, H)

    def layer(reads: Tensor, mask: Tensor, **fields: object) -> Layer:
        mask = mask & (torch.rand(mask.shape, generator=generator) >= recipe.holes)
        weight = drawn(*mask.shape) * mask / mask.shape[1] ** 0.5
        return Layer(weight, mask, drawn(len(mask)) * 0.3, **fields)  # type: ignore[arg-type]

    norm = {}
    if recipe.norm:
        norm = {"scale": drawn(H).abs() + 0.5, "shift": drawn(H) * 0.3}
    activation = Activation(recipe.activation, 0.3)
    context: dict[str, object] = {}
    if recipe.context:
        before = torch.sin if recipe.gate else None
        context["offset"] = Term(columns.T, before=before)  # type: ignore[union-attr]
        if recipe.gate:
            context["gate"] = Term(columns.T, drawn(H), Activation("sigmoid"))  # type: ignore[union-attr]
    layers = [layer(levels, degrees[:, None] >= levels, **{k: v for k, v in context.items() if k == "offset"})]
    for _ in range(recipe.blocks):
        square = degrees[:, None] >= degrees
        start = len(layers)
        layers.append(layer(degrees, square, source=start, activation=activation, **norm))
        layers.append(layer(degrees, square, source=start + 1, activation=activation, add=start, **context))
    out = levels[dims].repeat_interleave(univariate.parameters)
    layers.append(layer(degrees, out[:, None] > degrees, source=len(layers), activation=activation))
    return MaskedTransform(D, tuple(layers), univariate, tuple(dims))


def naive_inverse(transform: MaskedTransform, z: Tensor, context: Tensor | None) -> Tensor:
    """Returns x by as many whole passes as there are dimensions, as all libraries do it."""
    x, dims = z.clone(), list(transform.dims)
    for _ in range(transform.features):
        x = x.clone()
        x[:, dims], _ = transform.univariate.inverse(z[:, dims], transform.parameters(x, context))
    return x
