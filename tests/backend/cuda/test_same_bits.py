"""What results of the CUDA engine do not depend on: the grid, the order of threads, shared memory, the run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import random_latents, random_model
from cuda_emulation import emulated
from cuda_engines import IN_EMULATION, engine_of, inverse
from engines import GUIDED, expected, poisoned
from tolerances import GOLDEN, assert_close
from torch.nn.functional import pad

from tarflow_fast.backend.cuda import engine as cuda_engine
from tarflow_fast.backend.cuda import plan as cuda_plan
from tarflow_fast.engine import Condition, Guidance


@IN_EMULATION
@pytest.mark.parametrize("guidance", [Guidance(), GUIDED], ids=["unguided", "guided"])
def test_the_same_bits_for_any_grid_and_any_order_of_threads(guidance: Guidance, device: Any) -> None:
    model = random_model(8, num_classes=2, img_size=6, channels=64, head_dim=32, layers_per_block=2)
    z, condition = random_latents(model, 2), Condition(torch.tensor([1, -1]), guidance)
    wanted = None
    for seed, multiprocessors in enumerate((3, 3, 1, 2, 5, 7)):
        device(multiprocessors, seed=seed)
        engine = engine_of(model, 0, torch.bfloat16)
        assert engine.blocks == multiprocessors
        got = inverse(engine, z, condition)
        wanted = wanted or got
        assert all(map(torch.equal, got, wanted))


@pytest.mark.slow
@IN_EMULATION
@pytest.mark.parametrize("batch", [10, 17, 20], ids=["one group", "two groups", "two groups, of unlike sizes"])
def test_the_same_bits_with_and_without_gates(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As devices of compute capability 9 and 10 have them, and others do not; in pairs of blocks, in one without the
    other, and in several slots and in one."""
    model = random_model(8, num_classes=2, img_size=6, layers_per_block=2)
    z, condition = random_latents(model, batch), Condition((torch.arange(batch) % 3) - 1, GUIDED)
    wanted = None
    for gates in (False, True):
        native = emulated(2, gates=gates)
        monkeypatch.setattr(cuda_engine, "load_native", lambda native=native: native)
        for multiprocessors, slots in ((1, 8), (2, 8), (3, 1), (5, 2)):
            monkeypatch.setattr(cuda_plan, "MOST_SLOTS", slots)
            native.set_device(multiprocessors, 227 * 1024)
            native.set_seed(multiprocessors)
            engine = engine_of(model, 0, torch.bfloat16)
            assert engine._division(2 * batch).pairs == (batch > 16 and multiprocessors > 1)
            got = inverse(engine, z, condition)
            wanted = wanted or got
            assert all(map(torch.equal, got, wanted))
            # Where a device cannot hold all pairs at once, their blocks copy for themselves.
            engine._divisions = {n: replace(division, pairs=False) for n, division in engine._divisions.items()}
            assert all(map(torch.equal, inverse(engine, z, condition), wanted))
        native.set_device(3, 227 * 1024)
    assert_close(wanted[0], expected(model, 0, z, condition)[0], 0.1)


@pytest.mark.slow
@IN_EMULATION
@pytest.mark.parametrize("batch", [2, 10, 17], ids=["few rows", "one group", "pairs"])
@pytest.mark.parametrize("gates", [True, False], ids=["gates", "no gates"])
def test_blocks_that_have_nothing_to_multiply(batch: int, gates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They fetch nothing, and still attend, and normalise."""
    native = emulated(2, gates=gates)
    monkeypatch.setattr(cuda_engine, "load_native", lambda: native)
    model = random_model(8, num_classes=2, img_size=6, layers_per_block=2)
    z, condition = random_latents(model, batch), Condition((torch.arange(batch) % 3) - 1, GUIDED)
    native.set_device(4, 227 * 1024)
    engine = engine_of(model, 0, torch.bfloat16)
    wanted = inverse(engine, z, condition)
    two = {n: cuda_plan.make_division(engine.shape, n, 2, torch.device("cpu")) for n in engine._divisions}
    engine._divisions = {  # and two blocks more
        n: replace(division, work=pad(division.work, (0, 0, 0, 2)), jobs=pad(division.jobs, (0, 0, 0, 0, 0, 2)))
        for n, division in two.items()
    }
    engine._plans.clear()
    for seed in range(4):
        native.set_seed(seed)
        assert all(map(torch.equal, inverse(engine, z, condition), wanted))
    native.set_device(3, 227 * 1024)


@pytest.mark.slow
@IN_EMULATION
def test_the_same_bits_in_any_shared_memory(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one slot, or eight rows at a time, to all at once."""
    model = random_model(8, img_size=4, channels=96, head_dim=32, layers_per_block=2)
    z, condition = random_latents(model, 13), Condition(None, GUIDED)
    plans, wanted = set(), None
    for kilobytes, slots in ((227, 8), (227, 1), (20, 8), (17, 8), (14, 8), (14, 2), (14, 1)):
        device(2, kilobytes * 1024)
        monkeypatch.setattr(cuda_plan, "MOST_SLOTS", slots)
        engine = engine_of(model, 0, torch.bfloat16)
        plan = engine.plan(26)
        plans.add((plan.slots, plan.staged_rows))
        got = inverse(engine, z, condition)
        wanted = wanted or got
        assert all(map(torch.equal, got, wanted))
    assert plans == {(8, 32), (1, 32), (4, 32), (4, 16), (3, 8), (2, 8), (1, 8)}


@IN_EMULATION
@pytest.mark.parametrize(
    ("batch", "halvings"), [(2, (1, 1)), (9, (2, 3)), pytest.param(18, (0, 2), marks=pytest.mark.slow)]
)
def test_the_same_bits_where_blocks_share_the_inputs_of_a_tile(
    batch: int, halvings: tuple[int, int], device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of proj and fc2 in parts: of all parts in one block, of blocks for each, and with few keys asked for early."""
    monkeypatch.setattr(cuda_plan, "LEAST_K_TILES", 1)
    model = random_model(8, img_size=4, channels=64, head_dim=32, layers_per_block=2)
    z, condition = random_latents(model, batch), Condition(None, GUIDED)
    wanted = None
    for dtype in (torch.float32, torch.bfloat16):
        for multiprocessors in (1, 3, 9):
            device(multiprocessors)
            engine = engine_of(model, 0, dtype)
            engine._early_keys = multiprocessors
            plan = engine.plan(2 * batch)
            assert (plan.proj_halvings, plan.fc2_halvings) == halvings
            got = inverse(engine, z, condition)
            wanted = got if multiprocessors == 1 else wanted
            assert all(map(torch.equal, got, wanted))
        assert_close(got[0], expected(model, 0, z, condition)[0], GOLDEN if dtype == torch.float32 else 0.1)


@IN_EMULATION
@pytest.mark.parametrize("batch", [1, 13])
def test_blocks_of_eight_warps_as_on_a_gpu(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_engine, "load_native", lambda: emulated(8))
    model = random_model(8, channels=64, head_dim=32, num_classes=2, img_size=4)
    z, condition = random_latents(model, batch), Condition(torch.arange(batch) % 3 - 1, GUIDED)
    for dtype, tolerance in ((torch.float32, GOLDEN), (torch.bfloat16, 0.1)):
        engine = engine_of(model, 1, dtype)
        state = poisoned(engine, z, condition)
        engine.reverse(state)
        assert_close(state.x, expected(model, 1, z, condition)[0], tolerance)
        moved = engine.fixed_point(state, 1, model.config.num_patches)
        assert moved.change.max() <= tolerance / 10


@IN_EMULATION
@pytest.mark.parametrize("batch", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (17, 33))])
def test_phases_can_be_left_out(batch: int, device: Any) -> None:
    """For measurements: what is left is still a pass, which fetches the same weights. It leaves nothing behind that the
    next pass, of all phases, could take for its own."""
    model = random_model(img_size=4, layers_per_block=2)
    engine = engine_of(model)
    z = random_latents(model, batch)
    wanted = inverse(engine, z, Condition())
    state = engine.begin(z, Condition())
    for phase in range(7):
        state.cache.launch.set_size("skip_phases", 1 << phase)
        engine.reverse(state)
    state.cache.launch.set_size("skip_phases", 127)
    engine.reverse(state)
    state.cache.launch.set_size("skip_phases", 0)
    state.x.copy_(z)
    engine.reverse(state)
    assert torch.equal(state.x.cpu(), wanted[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_repeat_bit_by_bit(dtype: torch.dtype) -> None:
    model = random_model(5, num_classes=2, layers_per_block=2)
    engine = engine_of(model, 0, dtype)
    z, condition = random_latents(model, 3), Condition(torch.tensor([1, -1, 0]), GUIDED)
    first, second = (inverse(engine, z, condition) for _ in range(2))
    assert all(map(torch.equal, first, second))
