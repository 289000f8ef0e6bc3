"""Engines of masked transforms keep the contract: all passes give the inverse that whole passes over and over give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import SETS, cases
from masked_flows import LAWS, Recipe, naive_inverse, recipes, transform_of
from tolerances import INVERSE_F64, SAME_F64, assert_close
from torch import Tensor

from tarflow_fast.backend.cpu.masked import CpuMaskedEngine
from tarflow_fast.backend.pytorch.masked import TorchMaskedEngine
from tarflow_fast.engine.contract import BlockState
from tarflow_fast.engine.masked import ContextCondition, MaskedEngine, enter, leave
from tarflow_fast.errors import ArgumentError
from tarflow_fast.masked.sorting import SortedTransform, sort_transform
from tarflow_fast.masked.stepping import Buffer, Memory, invert

NATIVE = cases([s for s in SETS if not s.endswith("_bf16")], "cpu-{}".format, "cpu-{}".format)
every_engine = pytest.mark.parametrize("engine", ["torch", *NATIVE])
WIDE = Recipe(
    levels=tuple(i % 7 for i in range(40)), passed=3, hidden=50, blocks=2, context=2, gate=True, activation="tanh"
)


def engine_of(name: str, transform: SortedTransform, **options: Any) -> MaskedEngine:
    if name == "torch":
        return TorchMaskedEngine(transform)
    return CpuMaskedEngine(transform, instruction_set=name.removeprefix("cpu-"), **options)


def spoil(state: BlockState) -> None:
    """Fills with NaN all that a pass has to write before it reads it."""
    state.x[:, 1:], state.token_log_det[:, 1:] = torch.nan, torch.nan
    if isinstance(state.cache, Memory):
        for units in (*state.cache.read, *state.cache.raw.values()):
            assert isinstance(units, Buffer)
            units.values.fill_(torch.nan)
    else:
        state.cache[0].fill_(255)  # all bits set: a NaN


def case(recipe: Recipe, batch: int, dtype: torch.dtype = torch.float64) -> tuple[Any, Tensor, Tensor | None, Tensor]:
    transform = transform_of(recipe, dtype)
    z = torch.randn(batch, transform.features, dtype=dtype)
    context = torch.randn(batch, recipe.context, dtype=dtype) if recipe.context else None
    return transform, z, context, naive_inverse(transform, z, context)


def begun(engine: MaskedEngine, z: Tensor, context: Tensor | None) -> BlockState:
    state = engine.begin(enter(engine.transform, z), ContextCondition(context=context))
    spoil(state)
    return state


def check(transform: Any, engine: MaskedEngine, state: BlockState, context: Tensor | None, wanted: Tensor) -> None:
    x = leave(engine.transform, state.x)
    size = max(1.0, wanted.abs().max().item())  # rounding is relative
    assert_close(x / size, wanted / size, INVERSE_F64)
    _, log_det = transform.forward(wanted, context)
    assert_close(state.log_det / size, -log_det / size, INVERSE_F64)


@every_engine
@given(recipe=recipes(), batch=st.sampled_from([1, 3, 33]))
@settings(max_examples=60)
def test_the_sequential_pass_is_the_inverse(engine: str, recipe: Recipe, batch: int) -> None:
    transform, z, context, wanted = case(recipe, batch)
    made = engine_of(engine, sort_transform(transform))
    state = begun(made, z, context)
    made.reverse(state)
    check(transform, made, state, context, wanted)


@every_engine
@given(recipe=recipes(), data=st.data())
@settings(max_examples=60)
def test_passes_over_any_windows_are_the_inverse(engine: str, recipe: Recipe, data: st.DataObject) -> None:
    """Parallel passes from a guess over windows, with sequential ones between, up to the last dimension."""
    transform, z, context, wanted = case(recipe, 3)
    made = engine_of(engine, sort_transform(transform))
    state = begun(made, z, context)
    state.x[:, 1:] = 0.5  # a guess
    start, T = 1, made.tokens
    while start < T:
        stop = data.draw(st.integers(start + 1, T))
        if data.draw(st.booleans()):
            made.reverse(state, None, start, stop)
        else:
            for _ in range(stop - start):
                moved = made.fixed_point(state, start, stop)
            again = made.fixed_point(state, start, stop)
            assert again.change.max() <= SAME_F64
            assert moved.residual.shape == (3, stop - start)
        start = stop
    check(transform, made, state, context, wanted)


@every_engine
@given(recipe=recipes(), passes=st.integers(1, 4))
@settings(max_examples=40)
def test_a_sequential_pass_goes_on_where_parallel_ones_stopped(engine: str, recipe: Recipe, passes: int) -> None:
    """Each pass from a guess makes one more dimension final, which the units do not know of yet."""
    transform, z, context, wanted = case(recipe, 3)
    made = engine_of(engine, sort_transform(transform))
    state = begun(made, z, context)
    state.x[:, 1:] = 0.5  # a guess
    passes = min(passes, made.tokens - 1)
    for done in range(passes):
        made.fixed_point(state, 1 + done, made.tokens)
    made.reverse(state, None, 1 + passes)
    check(transform, made, state, context, wanted)


@every_engine
@pytest.mark.parametrize("law", LAWS)
def test_a_pass_tells_how_far_dimensions_moved_and_were(engine: str, law: str) -> None:
    recipe = Recipe(levels=(0, 1, 2, 3, 4), hidden=9, law=law, context=2)
    transform, z, context, _ = case(recipe, 4)
    made = engine_of(engine, sort_transform(transform))
    state = begun(made, z, context)
    guess = torch.randn_like(z)
    state.x.copy_(enter(made.transform, guess))
    moved = made.fixed_point(state, 1, made.tokens)
    dims = list(made.transform.dims)
    new, _ = transform.univariate.inverse(z, transform.parameters(guess, context))
    forward, _ = transform.forward(guess, context)
    assert_close(moved.change, (new - guess).abs()[:, dims], SAME_F64)
    assert_close(moved.residual, (forward - z).abs()[:, dims], SAME_F64)
    assert_close(leave(made.transform, state.x), new, SAME_F64)


@every_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wide_transform(engine: str, dtype: torch.dtype) -> None:
    transform, z, context, wanted = case(WIDE, 70, dtype)
    made = engine_of(engine, sort_transform(transform))
    state = begun(made, z, context)
    made.reverse(state)
    assert_close(leave(made.transform, state.x), wanted, 1e-4 if dtype == torch.float32 else INVERSE_F64)


@pytest.mark.parametrize("engine", NATIVE)
def test_neither_threads_nor_batch_mates_change_a_bit(engine: str) -> None:
    transform, z, context, _ = case(WIDE, 70, torch.float32)
    assert context is not None
    made = [engine_of(engine, sort_transform(transform), threads=threads) for threads in (1, 2)]
    results = []
    for each, some in ((made[0], slice(None)), (made[1], slice(None)), (made[0], slice(37, 38))):
        state = begun(each, z[some], context[some])
        each.reverse(state)
        results.append(state.x)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0][37:38], results[2])


@every_engine
def test_a_context_that_all_share_is_one_row(engine: str) -> None:
    transform, z, context, _ = case(WIDE, 5)
    assert context is not None
    made = engine_of(engine, sort_transform(transform))
    states = [begun(made, z, context[:1].expand(5, -1)), begun(made, z, context[:1])]
    for state in states:
        made.reverse(state)
    assert_close(states[0].x, states[1].x, SAME_F64)


@every_engine
def test_what_is_not_finite_stays_with_its_sample_and_its_dimensions(engine: str) -> None:
    transform, z, context, wanted = case(Recipe(levels=(0, 1, 2, 3), holes=0.0, law="exp"), 3)
    z[1, 2] = torch.nan
    made = engine_of(engine, sort_transform(transform))
    state = begun(made, z, context)
    made.reverse(state)
    x = leave(made.transform, state.x)
    assert x[1, 2:].isnan().all()
    assert_close(x[[0, 2]], wanted[[0, 2]], INVERSE_F64)
    assert_close(x[1, :2], wanted[1, :2], INVERSE_F64)
    assert state.first_nonfinite().tolist() == [5, 3, 5]


@every_engine
def test_wrong_shapes_and_windows_are_refused(engine: str) -> None:
    made = engine_of(engine, sort_transform(transform_of(WIDE)))
    with pytest.raises(ArgumentError, match="z"):
        made.begin(torch.zeros(2, 40, 1), ContextCondition())
    state = made.begin(torch.zeros(2, 41, 1), ContextCondition(context=torch.zeros(1, 2, dtype=torch.float64)))
    for start, stop in ((0, 3), (3, 42), (4, 3)):
        with pytest.raises(ArgumentError, match="start, stop"):
            made.reverse(state, None, start, stop)
    with pytest.raises(ArgumentError, match="start, stop"):
        made.fixed_point(state, 3, 3)


@given(recipe=recipes())
@settings(max_examples=40)
def test_autograd_goes_back_through_the_steps(recipe: Recipe) -> None:
    """Of x = f⁻¹(z): dx/dz · df/dx = 1, with the log-determinant of the Jacobian."""
    transform, z, context, wanted = case(recipe, 1)
    z.requires_grad_()
    x, log_det = invert(sort_transform(transform), z, context)
    assert_close(x, wanted, INVERSE_F64)
    rows = [torch.autograd.grad(x[0, i], z, retain_graph=True, allow_unused=True)[0] for i in range(x.shape[1])]
    jacobian = torch.stack([torch.zeros_like(z[0]) if row is None else row[0] for row in rows])
    assert_close(torch.linalg.slogdet(jacobian).logabsdet, log_det[0], 1e-8)
