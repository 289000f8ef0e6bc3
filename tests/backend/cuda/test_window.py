"""Windows whose rows share their keys and values on tensor cores (`csrc/cuda/window.cuh`), in half precision.

Each pass is held against PyTorch's in float64, with the error of PyTorch's own pass in that dtype as the measure, and
against the CUDA engine's where every row attends by itself.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import random_latents, random_model
from cuda_engines import HALVES, IN_EMULATION, engine_of
from engines import GUIDED, poisoned
from engines import engine_of as engine_on
from tolerances import error_budget, max_error
from torch import Tensor

from tarflow_fast.backend.cuda import engine as cuda_engine
from tarflow_fast.backend.cuda import plan as cuda_plan
from tarflow_fast.engine import BlockEngine, Condition, Guidance
from tarflow_fast.models.tarflow import TarFlow

SIZES: dict[str, Any] = {"img_size": 14, "channels": 128, "head_dim": 64, "num_classes": 2}
T = 49


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list that gets the number of tiles of each launch."""
    counted: list[int] = []
    count = cuda_engine.count_tiles

    def note(*arguments: Any) -> int:
        counted.append(count(*arguments))
        return counted[-1]

    monkeypatch.setattr(cuda_engine, "count_tiles", note)
    return counted


def one_pass(
    engine: BlockEngine, z: Tensor, guess: Tensor, condition: Condition, start: list[int], stop: list[int]
) -> Tensor:
    """The tokens after a pass over each sample's window, whose prefix is in the cache."""
    state = poisoned(engine, z, condition)
    state.x.copy_(guess)
    engine.fixed_point(state, [1] * len(start), start)  # fills the cache
    state.x.copy_(guess)
    engine.fixed_point(state, start, stop)
    return state.x.detach().cpu()


def model_and_guess(samples: int) -> tuple[TarFlow, Tensor, Tensor, Condition]:
    """A model, z, a guess of its inverse, and labels."""
    model = random_model(3, **SIZES)
    z = random_latents(model, samples)
    guess = z + 0.25 * random_latents(model, samples, seed=7)
    return model, z, guess, Condition(torch.arange(samples) % 3 - 1, Guidance())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("guidance", [Guidance(), GUIDED], ids=["unguided", "guided"])
@pytest.mark.parametrize(
    ("start", "stop", "wanted"),
    [
        ([1], [17], 1),  # 16 rows, which take all warps
        ([17], [T], 1),  # a whole tile, to the end
        ([20], [37], 1),  # one row in the second half of the warps
        ([5, 30], [21, 46], 2),  # each sample its own window
        ([40, 1], [49, 10], 2),  # tiles of few rows
    ],
    ids=str,
)
def test_a_pass_is_the_references(
    dtype: torch.dtype, guidance: Guidance, start: list[int], stop: list[int], wanted: int, tiles: list[int]
) -> None:
    model, z, guess, condition = model_and_guess(len(start))
    condition = Condition(condition.labels, guidance)
    exact = one_pass(engine_on(model, 0, "torch", torch.float64), z.double(), guess.double(), condition, start, stop)
    plain = one_pass(engine_on(model, 0, "torch", dtype), z, guess, condition, start, stop)
    got = one_pass(engine_of(model, 0, dtype), z, guess, condition, start, stop)
    assert wanted in tiles
    for b, (first, end) in enumerate(zip(start, stop, strict=True)):
        assert torch.equal(got[b, :first], guess[b, :first])
        assert torch.equal(got[b, end:], guess[b, end:])
    assert max_error(got, exact) <= error_budget(plain, exact, dtype)


def test_a_tile_attends_to_keys_that_another_one_makes(tiles: list[int]) -> None:
    """Of more than 32 rows of a sample: these are not copied before the other tile has made them."""
    model, z, guess, condition = model_and_guess(1)
    window = [2], [45]
    exact = one_pass(engine_on(model, 0, "torch", torch.float64), z.double(), guess.double(), condition, *window)
    plain = one_pass(engine_on(model, 0, "torch", torch.bfloat16), z, guess, condition, *window)
    got = one_pass(engine_of(model, 0, torch.bfloat16), z, guess, condition, *window)
    assert tiles[-1] == 2
    assert max_error(got, exact) <= error_budget(plain, exact, torch.bfloat16)


@pytest.mark.parametrize("splits", [1, 2, 3, 16])
def test_keys_of_a_window_may_be_split(splits: int, tiles: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 33 keys 16 splits have work for three."""
    monkeypatch.setattr(cuda_plan, "choose_splits", lambda pairs, tokens, blocks: splits)
    model, z, guess, condition = model_and_guess(2)
    window = [17, 12], [33, 28]
    got = one_pass(engine_of(model, 0, torch.bfloat16), z, guess, condition, *window)
    assert tiles[-1] == 2
    exact = one_pass(engine_on(model, 0, "torch", torch.float64), z.double(), guess.double(), condition, *window)
    plain = one_pass(engine_on(model, 0, "torch", torch.bfloat16), z, guess, condition, *window)
    assert max_error(got, exact) <= error_budget(plain, exact, torch.bfloat16)


def test_rows_attend_as_they_do_alone(tiles: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and weights are rounded to the dtype, which each row alone does not do: no more than that is between."""
    model, z, guess, condition = model_and_guess(3)
    window = [2, 9, 30], [18, 25, 46]
    engine = engine_of(model, 0, torch.bfloat16)
    together = one_pass(engine, z, guess, condition, *window)
    assert tiles[-1] == 3
    monkeypatch.setattr(cuda_engine, "count_tiles", lambda *arguments: 0)
    alone = one_pass(engine, z, guess, condition, *window)
    assert 0 < max_error(together, alone) <= 2**-6


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_token_that_overflows_reaches_none_before_it(value: float, tiles: list[int]) -> None:
    """Rows of a tile multiply the values of all its keys, by weights of 0 for those after their own."""
    model, z, guess, condition = model_and_guess(1)
    engine = engine_of(model, 0, torch.bfloat16)
    clean = one_pass(engine, z, guess, condition, [17], [33])
    for bad in (17, 24, 31):
        broken = guess.clone()
        broken[:, bad] = value
        got = one_pass(engine, z, broken, condition, [17], [33])
        assert tiles[-1] == 1
        assert torch.equal(got[:, : bad + 1][:, 17:], clean[:, : bad + 1][:, 17:])
        assert not got[:, bad + 1 : 33].isfinite().any()


@IN_EMULATION
@pytest.mark.parametrize("guidance", [Guidance(), GUIDED], ids=["unguided", "guided"])
def test_the_same_bits_for_any_grid_and_any_order_of_threads(
    guidance: Guidance, device: Any, tiles: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_plan, "choose_splits", lambda pairs, tokens, blocks: 2)
    model, z, guess, condition = model_and_guess(1)
    condition = Condition(condition.labels, guidance)
    wanted = None
    for seed, multiprocessors in enumerate((3, 3, 1, 5)):
        device(multiprocessors, seed=seed)
        got = one_pass(engine_of(model, 0, torch.bfloat16), z, guess, condition, [3], [46])
        wanted = got if wanted is None else wanted
        assert torch.equal(got, wanted)
    assert tiles[-1] == (1 if guidance is GUIDED else 2)


@IN_EMULATION
def test_the_same_bits_in_little_shared_memory(device: Any, tiles: list[int]) -> None:
    """The attention's parts need more than a product of few staged rows does, or lie within its memory."""
    model, z, guess, condition = model_and_guess(1)
    got = []
    for kilobytes, staged_rows in ((227, 24), (24, 8)):
        device(2, kilobytes * 1024)
        engine = engine_of(model, 0, torch.bfloat16)
        assert engine.plan(43, 2).staged_rows == staged_rows
        got.append(one_pass(engine, z, guess, condition, [3], [46]))
    assert tiles[-1] == 2
    assert torch.equal(*got)
