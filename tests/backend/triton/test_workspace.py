"""The Triton engine's workspaces: how they go from state to state, and how wide their windows are."""

from __future__ import annotations

import pytest
import torch
from cases import KERNEL_DEVICE, random_latents, random_model
from tolerances import GOLDEN, assert_close
from triton_engines import engine_of

from tarflow_fast import OutOfMemoryError
from tarflow_fast.backend.pytorch.engine import TorchEngine
from tarflow_fast.backend.triton.workspace import KEPT, Pool, Size, widened
from tarflow_fast.engine import Condition, Guidance
from tarflow_fast.errors import ArgumentError


def test_a_workspace_goes_from_block_to_block_and_from_batch_to_batch() -> None:
    model, pool = random_model(img_size=4), Pool()
    first, second = engine_of(model, 1, pool), engine_of(model, 0, pool)
    z = random_latents(model, 2)
    state = first.begin(z, Condition())
    workspace = state.cache
    later = second.begin(z, Condition(), reuse=state)
    assert later.cache is workspace
    assert pool.cached_bytes == 0
    beside = first.begin(z, Condition())
    assert beside.cache is not workspace  # in use
    del later, beside
    assert first.begin(z, Condition()).cache.size == workspace.size
    assert pool.cached_bytes == workspace.size.bytes


def test_a_state_whose_memory_was_handed_on_is_refused() -> None:
    model, pool = random_model(img_size=4), Pool()
    engine, z = engine_of(model, 0, pool), random_latents(model, 2)
    spent = engine.begin(z, Condition())
    owner = engine.begin(z, Condition(), reuse=spent)
    assert engine.begin(z, Condition(), reuse=spent).cache is not owner.cache
    guided = engine.begin(z, Condition(None, Guidance(1.0)), reuse=owner)
    assert guided.cache.size.branches == 2  # too large for it
    for run in (engine.reverse, lambda state: engine.fixed_point(state, 1, 2)):
        with pytest.raises(ArgumentError, match=r"^state: expected one whose memory was not handed on"):
            run(spent)


def test_a_pool_keeps_few_workspaces_and_gives_them_up_when_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pool = random_model(img_size=4), Pool()
    engine = engine_of(model, 0, pool)

    def held(batch: int) -> int:
        engine.begin(random_latents(model, batch), Condition())
        return len(pool._kept)

    assert [held(batch) for batch in (1, 2, 3, 4)] == [1, 2, KEPT, KEPT]
    held(3)
    assert [size.batch for size in pool._kept] == [4, 3]  # the least recently used first
    size = Size(model.config.block_shape, torch.float32, KERNEL_DEVICE, 5, 1)
    monkeypatch.setattr("tarflow_fast.backend.triton.workspace.free_memory", lambda device: size.bytes)
    assert held(5) == 2
    monkeypatch.setattr(
        "tarflow_fast.backend.triton.workspace.free_memory", lambda device: 3 * size.bytes // 5 if pool._kept else 0
    )
    with pytest.raises(OutOfMemoryError, match=r"^z: 6 samples need 0 MiB on .*, 0 would fit"):
        held(6)


@pytest.mark.parametrize("tokens", [*range(2, 19), 32, 33, 34])
def test_windows_are_widened_to_few_widths(tokens: int) -> None:
    widths = set()
    for start in range(1, tokens):
        for stop in range(start + 1, tokens + 1):
            first, last = widened(start, stop, tokens)
            assert 1 <= first <= start < stop <= last <= tokens
            assert last - first < max(2 * (stop - start), 2)
            assert first == 1 or last == stop  # to the right where there is nothing to the left
            widths.add(last - first)
    assert widths == {2**i for i in range(6) if 2**i < tokens - 1} | {tokens - 1}


SOME_WINDOWS = ((1, 13), (2, 14), (3, 13), (7, 9), (15, 1))  # width, start: into each buffer
ALL_WINDOWS = ((1, 9), (2, 1), (3, 10), (4, 12), (5, 2), (6, 10), (7, 7), (8, 6), (9, 5), (12, 2), (15, 1))


@pytest.mark.parametrize(
    "windows", [SOME_WINDOWS, pytest.param(ALL_WINDOWS, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_windows_of_any_width_are_those_of_the_torch_backend(windows: tuple[tuple[int, int], ...]) -> None:
    """In the buffers of few widths, whatever the pass before left there; what follows finds keys and values right."""
    model = random_model(11, num_classes=2)
    T, z = model.config.num_patches, random_latents(model, 2)
    condition = Condition(torch.tensor([1, -1], device=KERNEL_DEVICE), Guidance(1.5, "ab", 0.7, True))
    weights = model.block_weights(0)
    engine, of_torch = engine_of(model), TorchEngine(weights, device=KERNEL_DEVICE, dtype=torch.float32)
    state, wanted = engine.begin(z, condition), of_torch.begin(z, condition)
    engine.reverse(state)
    of_torch.reverse(wanted)
    whole = wanted.x.clone()
    for width, start in windows:
        stop = start + width
        state.cache.x.fill_(torch.nan)
        state.x.copy_(wanted.x)
        for each in (state, wanted):
            each.x[:, start:] = each.z[:, start:] + 0.5
        for _ in range(2):
            before = state.x.clone()
            moved, wanted_moved = engine.fixed_point(state, start, stop), of_torch.fixed_point(wanted, start, stop)
            assert torch.equal(state.x[:, :start], before[:, :start])
            assert torch.equal(state.x[:, stop:], before[:, stop:])
            for got, expected in zip(moved, wanted_moved, strict=True):
                assert_close(got, expected, GOLDEN)
            assert_close(state.x, wanted.x, GOLDEN)
            assert_close(state.token_log_det, wanted.token_log_det, GOLDEN)
        engine.reverse(state, start=start)
        of_torch.reverse(wanted, start=start)
        assert_close(state.x, whole, GOLDEN)
    assert T == 16
    assert set(state.cache.windows) == {1, 2, 4, 8, 15}


def test_a_workspace_outlives_inference_mode_and_other_defaults() -> None:
    """Buffers that were made under inference mode or another default dtype serve batches outside of it."""
    model = random_model(img_size=4)
    engine, z = engine_of(model), random_latents(model, 2).to(KERNEL_DEVICE)
    found = []
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            state = engine.begin(z, Condition())
            engine.reverse(state)
            engine.fixed_point(state, 1, 3)
            found.append(state.x.clone())
    finally:
        torch.set_default_dtype(torch.float32)
    workspace = state.cache
    del state
    state = engine.begin(z, Condition())
    assert state.cache is workspace
    engine.reverse(state)
    engine.fixed_point(state, 1, 3)
    assert_close(state.x, found[0], GOLDEN)


def test_counters_of_a_launch_that_was_broken_off_are_forgotten() -> None:
    """Programs that share a tile count themselves, and an error may have ended a launch after some had come."""
    model = random_model(img_size=4)
    engine, z = engine_of(model), random_latents(model, 2).to(KERNEL_DEVICE)
    state = engine.begin(z, Condition())
    engine.reverse(state)
    engine.fixed_point(state, 1, 3)
    for window in state.cache.windows.values():
        window.scratch.arrived.fill_(1)
    again = engine.begin(z, Condition(), reuse=state)
    assert set(again.cache.windows) == {1, 2}
    assert not any(window.scratch.arrived.any() for window in again.cache.windows.values())
