"""The kernel that inverts a masked transform against whole passes over and over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import KERNEL_DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_flows import LAWS, Recipe, naive_inverse, recipes, transform_of
from tolerances import assert_close

from tarflow_fast.errors import ArgumentError
from tarflow_fast.masked.sorting import sort_transform

pytest.importorskip("triton")

import triton
import triton.language as tl

from tarflow_fast.backend.triton.masked import TritonMasked, masked_missing
from tarflow_fast.kernels import masked_inverse as op


@pytest.fixture(autouse=True, scope="module")
def _poison() -> Iterator[None]:
    """Memory that was not written is NaN, as torch fills it when it is told to be deterministic."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(recipe: Recipe, batch: int, shared: bool = False) -> None:
    transform = transform_of(recipe)
    z = torch.randn(batch, transform.features, dtype=torch.float64)
    context = torch.randn(1 if shared else batch, recipe.context, dtype=torch.float64) if recipe.context else None
    wanted = naive_inverse(transform, z, context)
    _, log_det = transform.forward(wanted, context)
    made = TritonMasked(sort_transform(transform_of(recipe, torch.float32)))
    x, ours = made.run(z.float().to(KERNEL_DEVICE), None if context is None else context.float().to(KERNEL_DEVICE))
    size = max(1.0, wanted.abs().max().item())
    assert_close(x / size, wanted.float() / size, 1e-4)
    assert_close(ours / size, -log_det.float() / size, 3e-4)


@pytest.mark.slow
@given(recipe=recipes(("softclip", "softplus", "sigmoid", "shift", "floor spline")), batch=st.sampled_from([1, 17]))
@settings(max_examples=25)
def test_any_transform(recipe: Recipe, batch: int) -> None:
    check(recipe, batch)


@pytest.mark.parametrize("law", LAWS)
def test_every_law(law: str) -> None:
    check(Recipe(levels=(2, 0, 1, 1, 3), law=law, context=2, activation="tanh"), 20)


def test_more_units_than_a_product_takes_and_a_context_that_all_share() -> None:
    check(Recipe(levels=(0, 1, 0, 1, 1), hidden=90, holes=0.0, context=2, norm=True, activation="gelu"), 3, shared=True)
    check(Recipe(levels=(0, 0, 0, 1, 1), passed=3, hidden=40, blocks=0, law="spline"), 3)


@triton.jit
def sin_kernel(to, x, N: tl.constexpr):
    there = tl.arange(0, N)
    tl.store(to + there, op._sin(tl.load(x + there)))


@pytest.mark.parametrize("largest", [3.2, 1e2, 1e4, 1e5, 1e12])
def test_sin_of_large_arguments_too(largest: float) -> None:
    x = (torch.rand(4096, generator=torch.Generator().manual_seed(0)) * 2 - 1) * largest
    y = torch.full_like(x, torch.nan).to(KERNEL_DEVICE)
    sin_kernel[1,](y, x.to(KERNEL_DEVICE), N=4096)
    assert y.abs().max() <= 1.000001
    if largest <= 1e5:
        assert_close(y.cpu().double(), x.double().sin(), 1.3e-7 if largest <= 1e4 else 1e-6)


def test_sin_of_what_is_no_number() -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0], device=KERNEL_DEVICE)
    y = torch.zeros_like(x)
    sin_kernel[1,](y, x, N=4)
    assert y.isnan().tolist() == [True, True, True, False]
    assert y[3] == 0


def test_what_the_kernel_does_not_take_is_said() -> None:
    made = sort_transform(transform_of(Recipe(levels=(0, 1)), torch.float64))
    assert "float32" in str(masked_missing(made, torch.float64))
    assert masked_missing(made, torch.float32) is None
    program = TritonMasked(sort_transform(transform_of(Recipe(levels=(0, 1)), torch.float32)))._program
    with pytest.raises(ArgumentError, match="z"):
        op.masked_inverse(program, torch.zeros(3, 16), torch.zeros(1, 1))
