"""Engines over some of the tokens: windows of parallel passes, one for each sample, parts of the sequential pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import random_latents, random_model
from engine_laws import (
    check_part_refused,
    check_parts,
    check_raggedness,
    check_window_refused,
    check_windows,
    memory_held,
)
from engines import BACKENDS, CUDA, GUIDED, NATIVE, RAGGED, engine_of, poisoned
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import GOLDEN, INVERSE_F64, SAME_F64, assert_close

from tarflow_fast.engine import Condition, Guidance


@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [("torch", torch.float64, INVERSE_F64), pytest.param("cpu", torch.float32, 0.0, marks=NATIVE.marks)],
)
@pytest.mark.parametrize("guidance", [Guidance(), GUIDED], ids=["unguided", "guided"])
@settings(max_examples=15)
@given(data=st.data())
def test_fixed_point_in_any_windows_equals_sequential(
    backend: str, dtype: torch.dtype, tolerance: float, guidance: Guidance, data: st.DataObject
) -> None:
    check_windows(backend, dtype, tolerance, guidance, data)


# Of T = 9 tokens, and of 4, as interpreter and emulation are slow; there are fewer examples for the same reason.
FEW_TOKENS = pytest.mark.parametrize("img_size", [4, pytest.param(6, marks=pytest.mark.slow)])


@pytest.mark.parametrize("backend", ["triton", CUDA])
@pytest.mark.parametrize(
    "guidance", [pytest.param(Guidance(), marks=pytest.mark.slow), GUIDED], ids=["unguided", "guided"]
)
@FEW_TOKENS
@settings(max_examples=3)
@given(data=st.data())
def test_fixed_point_of_the_kernels(backend: str, guidance: Guidance, img_size: int, data: st.DataObject) -> None:
    """The same law. Windows of other sizes are summed in another order."""
    check_windows(backend, torch.float32, GOLDEN, guidance, data, img_size)


@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [("torch", torch.float64, INVERSE_F64), pytest.param("cpu", torch.float32, 0.0, marks=NATIVE.marks)],
)
@pytest.mark.parametrize("guidance", [Guidance(), GUIDED], ids=["unguided", "guided"])
@settings(max_examples=25)
@given(data=st.data())
def test_parts_of_the_tokens_are_the_whole(
    backend: str, dtype: torch.dtype, tolerance: float, guidance: Guidance, data: st.DataObject
) -> None:
    check_parts(backend, dtype, tolerance, guidance, data)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["triton", CUDA])
@pytest.mark.parametrize("guidance", [Guidance(), GUIDED], ids=["unguided", "guided"])
@FEW_TOKENS
@settings(max_examples=3)
@given(data=st.data())
def test_parts_of_the_tokens_by_the_kernels(
    backend: str, guidance: Guidance, img_size: int, data: st.DataObject
) -> None:
    check_parts(backend, torch.float32, GOLDEN, guidance, data, img_size)


BAD_WINDOWS = [(0, 1), (2, 2), (3, 2), (1, 5), (1.0, 2), (1, None), ([1], 2), (1, [2]), ("1", "2")]
BAD_RAGGED = [([1, 2], [2]), ([1], [2]), ([0, 1], [1, 2]), ([1, 3], [2, 2]), ([1, 1], [2, 5]), ([1, 1], [2, 2.0])]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [*BAD_WINDOWS, *BAD_RAGGED], ids=repr)
def test_a_window_outside_the_sequence_is_refused(backend: str, window: tuple[Any, Any]) -> None:
    check_window_refused(backend, window)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("part", [(0, 1), (3, 2), (1, 5), (5, 5), (1.0, 2), ([1, 1], [2, 2])], ids=repr)
def test_a_part_outside_the_sequence_is_refused(backend: str, part: tuple[Any, Any]) -> None:
    check_part_refused(backend, part)


# A window for each sample


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_engine_says_whether_it_takes_a_window_for_each_sample(backend: str) -> None:
    check_raggedness(backend)


@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [("torch", torch.float64, SAME_F64), pytest.param("cpu", torch.float32, 0.0, marks=NATIVE.marks)],
)
@pytest.mark.parametrize("nvp", [True, False])
@pytest.mark.parametrize("guidance", [Guidance(), GUIDED, Guidance(2.0, "a")], ids=repr)
@settings(max_examples=25)
@given(data=st.data())
def test_windows_of_samples_are_those_of_each_alone(
    backend: str, dtype: torch.dtype, tolerance: float, nvp: bool, guidance: Guidance, data: st.DataObject
) -> None:
    check_ragged(backend, dtype, tolerance, nvp, guidance, data)


@pytest.mark.parametrize("backend", [CUDA])
@pytest.mark.parametrize("nvp", [True, False])
@pytest.mark.parametrize("guidance", [Guidance(), Guidance(2.0, "a")], ids=repr)
@settings(max_examples=3)
@given(data=st.data())
def test_windows_of_samples_by_the_cuda_kernel(
    backend: str, nvp: bool, guidance: Guidance, data: st.DataObject
) -> None:
    check_ragged(backend, torch.float32, GOLDEN, nvp, guidance, data)


def check_ragged(
    backend: str, dtype: torch.dtype, tolerance: float, nvp: bool, guidance: Guidance, data: st.DataObject
) -> None:
    """Several passes. The cache holds what memory did before, and what a pass is not to look at of x is NaN."""
    model = random_model(11, dtype, num_classes=2, img_size=6, layers_per_block=2, head_dim=32, nvp=nvp)
    B, T = 3, model.config.num_patches
    labels, z = torch.tensor([1, -1, 0]), random_latents(model, B, seed=data.draw(st.integers(0, 9)))
    engine = engine_of(model, 0, backend, dtype)
    state = engine.begin(z, Condition(labels, guidance))
    alone = [engine.begin(z[b : b + 1], Condition(labels[b : b + 1], guidance)) for b in range(B)]
    held = memory_held(data, dtype)
    for each in (state, *alone):
        each.cache.keys_values.fill_(held)
    starts = [1] * B
    for _ in range(data.draw(st.integers(1, 4))):
        starts = [data.draw(st.integers(1, start)) for start in starts]
        stops = [data.draw(st.integers(start, T)) for start in starts]
        x, log_det = state.x.clone(), state.token_log_det.clone()
        token = torch.arange(T)
        inside = torch.stack([(token >= a) & (token < b) for a, b in zip(starts, stops, strict=True)])
        read = torch.stack([(token >= a - 1) & (token < b) for a, b in zip(starts, stops, strict=True)])
        state.x[~read] = torch.nan
        moved = engine.fixed_point(state, starts, stops)
        assert state.x[~read].isnan().all()
        state.x[~read] = x[~read]
        assert torch.equal(state.x[~inside], x[~inside])
        assert torch.equal(state.token_log_det[~inside], log_det[~inside])
        widest = max(stop - start for start, stop in zip(starts, stops, strict=True))
        assert moved.change.shape == moved.residual.shape == (B, widest)
        for b, (each, start, stop) in enumerate(zip(alone, starts, stops, strict=True)):
            width = stop - start
            assert not torch.stack(moved)[:, b, width:].any()
            if width == 0:
                continue
            wanted = engine.fixed_point(each, start, stop)
            assert_close(moved.change[b, :width], wanted.change[0], tolerance)
            assert_close(moved.residual[b, :width], wanted.residual[0], tolerance)
            assert_close(state.x[b], each.x[0], tolerance)
            assert_close(state.token_log_det[b], each.token_log_det[0], tolerance)
        starts = [max(start, stop) for start, stop in zip(starts, stops, strict=True)]  # as far as the cache goes


@pytest.mark.parametrize("backend", RAGGED)
@pytest.mark.parametrize("guidance", [Guidance(), GUIDED], ids=["unguided", "guided"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e38])
@pytest.mark.parametrize(
    ("starts", "stops"),
    [([2, 1, 3], [9, 9, 5]), ([3, 9, 9], [9, 9, 9]), ([2, 7, 9], [8, 8, 9]), ([5, 6, 7], [6, 7, 8])],
    ids=str,
)
def test_what_is_not_finite_stays_with_its_sample(
    backend: str, guidance: Guidance, bad: float, starts: list[int], stops: list[int]
) -> None:
    """And with the tokens after it, in a window of one sample or of one token as well."""
    model = random_model(11, num_classes=2, img_size=6)
    condition = Condition(torch.tensor([1, -1, 0]), guidance)
    z = random_latents(model, 3)
    engine = engine_of(model, 0, backend)
    wanted, spoilt = (poisoned(engine, z, condition) for _ in range(2))
    for state in (wanted, spoilt):
        engine.reverse(state, stop=max(starts))
        state.x[:, 1:] = torch.where(state.x[:, 1:].isnan(), z[:, 1:], state.x[:, 1:])
    spoilt.x[0, 4] = bad
    for state in (wanted, spoilt):
        moved = engine.fixed_point(state, starts, stops)
    assert torch.equal(spoilt.x[1:], wanted.x[1:])
    assert torch.equal(spoilt.token_log_det[1:, : max(starts)], wanted.token_log_det[1:, : max(starts)])
    assert torch.isfinite(torch.stack(moved)[:, 1:]).all()
    assert torch.equal(spoilt.x[0, :4], wanted.x[0, :4])
    if starts[0] < 5:
        assert torch.equal(spoilt.x[0, 4], wanted.x[0, 4])
    after = spoilt.x[0, max(5, starts[0]) : stops[0]]  # of the tokens of the window, those that see it
    assert not torch.equal(after, wanted.x[0, max(5, starts[0]) : stops[0]])
    assert bad == 1e38 or after.isnan().all()


@pytest.mark.parametrize("backend", RAGGED)
def test_no_window_for_any_sample_is_no_pass(backend: str) -> None:
    model = random_model(img_size=4)
    engine = engine_of(model, 0, backend)
    state = engine.begin(random_latents(model, 2), Condition())
    moved = engine.fixed_point(state, [1, 4], [1, 4])
    assert moved.change.shape == moved.residual.shape == (2, 0)
    assert torch.equal(state.x, state.z)
