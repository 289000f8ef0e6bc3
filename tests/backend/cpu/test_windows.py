"""Parallel passes of the native CPU engine give the bits of the sequential one, whatever the windows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from cases import random_latents, random_model
from cpu_engines import engine_of, inverse
from engines import GUIDED, poisoned
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import every_set
from torch import Tensor

from tarflow_fast.engine import BlockState, Condition, Guidance


@every_set
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 30])
def test_fixed_point_windows_give_the_same_bits(isa: str, threads: int, batch: int) -> None:
    model = random_model(6, num_classes=2, img_size=14)
    T = model.config.num_patches
    z = random_latents(model, batch)
    condition = Condition(torch.arange(batch) % 3 - 1, GUIDED)
    engine = engine_of(model, 0, instruction_set=isa, threads=threads)
    wanted, _ = inverse(engine, z, condition)
    state = engine.begin(z, condition)
    state.cache.keys_values.fill_(torch.nan)
    for start, stop in ((1, 2), (2, 5), (5, T)):
        for _ in range(stop - start):
            before = state.x.clone()
            change = engine.fixed_point(state, start, stop).change
            assert torch.equal(change, (state.x - before)[:, start:stop].abs().amax(-1))
            if not change.any():
                break
    assert torch.equal(state.x, wanted)


@st.composite
def windows_of(draw: st.DrawFn, tokens: int) -> list[tuple[int, int]]:
    """A window [start, stop) for each of some samples, one at least with a token in it."""
    batch = draw(st.sampled_from([1, 2, 3, 8, 30, 65]))
    sizes = st.sampled_from([(0, 0), (0, 2), (0, tokens - 1), (tokens - 1, tokens - 1)])
    least, most = draw(sizes), draw(sizes)  # of the first samples, and of the others
    windows = []
    for b in range(batch):
        start = draw(st.integers(1, tokens))
        low, high = least if b < batch // 2 else most
        start = min(start, tokens - low)
        windows.append((start, min(start + draw(st.integers(low, high)), tokens)))
    return windows if any(start < stop for start, stop in windows) else [(1, 2), *windows[1:]]


def cached(state: BlockState, samples: slice, layers: int) -> Tensor:
    """The bits of the keys and values of some samples, (layers, branches, samples, …)."""
    keys_values = state.cache.keys_values
    bits = keys_values.view(torch.int32 if keys_values.dtype == torch.float32 else torch.int16)
    return bits.view(layers, -1, state.x.shape[0], bits.numel() // layers // state.cache.rows)[:, :, samples]


@contextmanager
def memory_of_nans() -> Iterator[None]:
    """New tensors are NaN until they are written."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@every_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("guidance", [Guidance(), GUIDED], ids=["unguided", "guided"])
@settings(max_examples=10)
@given(data=st.data())
def test_windows_of_their_own_give_the_same_bits(
    isa: str, dtype: torch.dtype, guidance: Guidance, data: st.DataObject
) -> None:
    """Equal, in all that is written and in all that is not, to every sample alone and its window as a rectangle."""
    model = random_model(6, num_classes=2, layers_per_block=2)
    T = model.config.num_patches
    windows = data.draw(windows_of(T))
    batch, widest = len(windows), max(stop - start for start, stop in windows)
    z, labels = random_latents(model, batch), torch.arange(batch) % 3 - 1
    engine = engine_of(model, 0, dtype, instruction_set=isa, threads=1)
    alone = [engine.begin(z[b : b + 1], Condition(labels[b : b + 1], guidance)) for b in range(batch)]
    change, residual = torch.zeros(2, batch, widest)
    for b, (start, stop) in enumerate(windows):
        alone[b].cache.keys_values.fill_(torch.nan)
        if start > 1:
            engine.fixed_point(alone[b], 1, start)
        if start < stop:
            for moved, row in zip(engine.fixed_point(alone[b], start, stop), (change, residual), strict=True):
                row[b, : stop - start] = moved[0]
    starts, stops = zip(*windows, strict=True)
    for threads in (1, 2, 3):
        engine.threads = threads
        state = engine.begin(z, Condition(labels, guidance))
        state.cache.keys_values.fill_(torch.nan)
        engine.fixed_point(state, [1] * batch, starts)
        with memory_of_nans():
            moved = engine.fixed_point(state, starts, stops)
        assert torch.equal(moved.change, change)
        assert torch.equal(moved.residual, residual)
        for b in range(batch):
            assert torch.equal(state.x[b], alone[b].x[0])
            assert torch.equal(state.token_log_det[b], alone[b].token_log_det[0])
            assert torch.equal(*(cached(*each, 2) for each in ((state, slice(b, b + 1)), (alone[b], slice(1)))))


@every_set
@pytest.mark.parametrize("guidance", [Guidance(), GUIDED], ids=["unguided", "guided"])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 30])
def test_parts_of_the_sequential_pass_give_the_same_bits(
    isa: str, guidance: Guidance, threads: int, batch: int
) -> None:
    """The first tokens one by one, those after them by parallel passes, the rest one by one."""
    model = random_model(6, num_classes=2)
    T = model.config.num_patches
    z, condition = random_latents(model, batch), Condition(torch.arange(batch) % 3 - 1, guidance)
    engine = engine_of(model, 0, instruction_set=isa, threads=threads)
    x, log_det = inverse(engine, z, condition)
    for first, second in ((1, 1), (1, 4), (5, 5), (3, 9), (9, T), (T, T)):
        state, steps = poisoned(engine, z, condition), []
        engine.reverse(state, steps.append, stop=first)
        assert torch.equal(state.x[:, :first], x[:, :first])
        assert state.x[:, first:].isnan().all()
        assert state.token_log_det[:, first:].isnan().all()
        for _ in range(second - first):
            engine.fixed_point(state, first, second)
        engine.reverse(state, steps.append, second, T)
        assert torch.equal(state.x, x)
        assert torch.equal(state.token_log_det, log_det)
        assert sum(steps) == T - 1 - (second - first)
