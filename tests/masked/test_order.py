"""The order of an inverse is read off the masks: the fewest steps, and each unit as soon as it can be evaluated."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from masked_flows import Recipe, recipes, transform_of

from tarflow_fast.errors import ArgumentError
from tarflow_fast.masked import Affine, Layer, MaskedTransform, Shift
from tarflow_fast.masked.sorting import sort_transform


def direct(mask: torch.Tensor) -> MaskedTransform:
    """A network of one layer: parameters read dimensions."""
    return MaskedTransform(len(mask), (Layer(torch.ones(mask.shape), mask),), Shift())


def test_steps_are_the_longest_chain() -> None:
    chain = torch.ones(5, 5, dtype=torch.bool).tril(-1)
    assert direct(chain).order.steps == 5
    assert direct(chain.flip(0).flip(1)).order.dims.tolist() == [4, 3, 2, 1, 0]
    coupling = torch.zeros(5, 5, dtype=torch.bool)
    coupling[[1, 3]] = torch.tensor([True, False, True, False, True])
    assert direct(coupling).order.dims.tolist() == [0, 1, 0, 1, 0]
    assert direct(torch.zeros(5, 5, dtype=torch.bool)).order.steps == 1


def test_masks_count_and_weights_do_not() -> None:
    chain = torch.ones(4, 4, dtype=torch.bool).tril(-1)
    zero = MaskedTransform(4, (Layer(torch.zeros(4, 4), chain),), Shift())
    assert zero.order.steps == 4


def test_a_circle_is_refused() -> None:
    circle = torch.tensor([[False, True], [True, False]])
    with pytest.raises(ArgumentError, match=r"no dimension depends on itself.*\[0, 1\]"):
        direct(circle)
    with pytest.raises(ArgumentError, match="circle"):
        direct(torch.eye(3, dtype=torch.bool))


def test_layers_that_do_not_fit_are_refused() -> None:
    mask = torch.zeros(4, 2, dtype=torch.bool)
    with pytest.raises(ArgumentError, match="4 outputs"):
        MaskedTransform(2, (Layer(torch.zeros(2, 2), mask[:2]),), Affine("exp"))
    with pytest.raises(ArgumentError, match="earlier value"):
        MaskedTransform(2, (Layer(torch.zeros(4, 2), mask, source=1),), Affine("exp"))
    with pytest.raises(ArgumentError, match="mask"):
        Layer(torch.zeros(4, 2), mask.T)


@given(recipes())
def test_what_a_unit_reads_is_a_prefix_of_what_is_known(recipe: Recipe) -> None:
    transform = transform_of(recipe)
    made = sort_transform(transform)
    for layer in made.layers:
        for step in range(made.steps):
            rows = layer.weight[layer.begin[step] : layer.begin[step + 1]]
            assert not rows[:, layer.reach[step] :].any()
    known = transform.order.dims[made.dims]
    assert torch.equal(known, known.sort().values)
    assert sorted(made.dims.tolist()) == list(range(transform.features))


def test_in_a_made_every_weight_that_is_multiplied_is_unmasked() -> None:
    transform = transform_of(Recipe(levels=(2, 0, 3, 1), holes=0.0, hidden=24))
    made = sort_transform(transform)
    for layer in made.layers:
        rows = [b - a for a, b in zip(layer.begin, layer.begin[1:], strict=False)]
        multiplied = sum(n * reach for n, reach in zip(rows, layer.reach, strict=True))
        assert multiplied == int(layer.weight.count_nonzero())
