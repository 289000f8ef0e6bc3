"""The CUDA engine beyond what tests/engine/ asks of every backend. Without a GPU it runs in the emulation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import random_latents, random_model
from cuda_engines import EMULATED, HALVES, engine_of, inverse
from engines import GUIDED, expected
from tolerances import BATCH, GOLDEN, assert_close, error_budget, max_error

from tarflow_fast import reference
from tarflow_fast.backend.cuda import plan as cuda_plan
from tarflow_fast.engine import Condition, Guidance

TINY: dict[str, Any] = {"img_size": 4, "channels": 32, "head_dim": 16, "num_classes": 3}
AROUND_TILES = [1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 56, 63, 64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("guidance", [Guidance(), GUIDED], ids=["unguided", "guided"])
@pytest.mark.parametrize(
    "rows", [AROUND_TILES, pytest.param(range(1, 65), marks=pytest.mark.slow)], ids=["around tiles", "all"]
)
def test_any_number_of_rows(dtype: torch.dtype, guidance: Guidance, rows: Sequence[int]) -> None:
    """R = 1 … 64 in one launch, and then more in several: as a batch of all, which in fp32 is the reference's."""
    model = random_model(4, **TINY)
    z, labels = random_latents(model, 70), torch.arange(70) % 4 - 1
    engine = engine_of(model, 1, dtype)
    whole = inverse(engine, z, Condition(labels, guidance))
    if dtype == torch.float32:
        x, log_det = expected(model, 1, z, Condition(labels, guidance))
        assert_close(whole[0], x, GOLDEN)
        assert_close(whole[1], log_det, GOLDEN)
    branches = 2 if guidance.active else 1
    for batch in (*sorted({-(-R // branches) for R in rows}), 66):
        got = inverse(engine, z[:batch], Condition(labels[:batch], guidance))
        for ours, wanted in zip(got, whole, strict=True):
            assert_close(ours, wanted[:batch], BATCH if dtype == torch.float32 else 0.05)


SHAPES = [
    {"channels": 128, "layers_per_block": 2, "num_classes": 3},  # two heads of 64
    {"channels": 96, "head_dim": 32, "in_channels": 3, "img_size": 6},
    {"channels": 128, "head_dim": 128, "img_size": 6},  # a key fills a warp in fp32
    {"channels": 35, "head_dim": 7, "img_size": 10, "patch_size": 5, "layers_per_block": 2},  # nothing is even
    {"channels": 36, "head_dim": 12, "img_size": 8, "patch_size": 4, "in_channels": 3},  # D > C
    {"channels": 24, "head_dim": 8, "img_size": 6, "patch_size": 3, "num_classes": 2, "nvp": False},
    {"channels": 32, "head_dim": 32, "img_size": 14, "patch_size": 2},  # T = 49
    {"channels": 16, "head_dim": 16, "img_size": 4, "patch_size": 2, "layers_per_block": 3},
]
WIDE = {"channels": 1040, "head_dim": 16, "img_size": 4}  # a row does not fit in a warp's registers
SLOW = [pytest.mark.slow] if EMULATED else []


@pytest.mark.parametrize("sizes", [*SHAPES, pytest.param(WIDE, marks=SLOW)], ids=str)
@pytest.mark.parametrize("guidance", [Guidance(), GUIDED], ids=["unguided", "guided"])
def test_shapes(sizes: dict[str, Any], guidance: Guidance) -> None:
    model = random_model(3, **sizes)
    z = random_latents(model, 3)
    condition = Condition(torch.tensor([0, -1, 1]) if model.config.num_classes else None, guidance)
    x, log_det = expected(model, 1, z, condition)
    got = inverse(engine_of(model, 1), z, condition)
    assert_close(got[0], x, GOLDEN)
    assert_close(got[1], log_det, GOLDEN)


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        *itertools.product(SHAPES, HALVES[:1]),
        *(pytest.param(*each, marks=SLOW) for each in itertools.product(SHAPES, HALVES[1:])),
        *(pytest.param(WIDE, dtype, marks=SLOW) for dtype in HALVES),
    ],
    ids=str,
)
def test_shapes_in_half_precision(sizes: dict[str, Any], dtype: torch.dtype) -> None:
    """As good as the reference evaluated in that dtype."""
    model = random_model(3, **sizes)
    z = random_latents(model, 3)
    condition = Condition(torch.tensor([0, -1, 1]) if model.config.num_classes else None, GUIDED)
    exact, _ = expected(model, 0, z, condition)
    plain, _ = expected(model, 0, z, condition, dtype)
    got, _ = inverse(engine_of(model, 0, dtype), z, condition)
    assert max_error(got, exact) <= error_budget(plain, exact, dtype)


def test_a_single_token_passes_unchanged() -> None:
    model = random_model(img_size=2)
    engine, z = engine_of(model), random_latents(model, 2)
    state = engine.begin(z, Condition())
    engine.reverse(state)
    assert torch.equal(state.x.cpu(), z)
    assert not state.token_log_det.any()


@pytest.mark.parametrize("splits", [1, 3, pytest.param(16, marks=pytest.mark.slow)])
def test_keys_may_be_split(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among blocks, two keys each at least; some splits are empty at first."""
    monkeypatch.setattr(cuda_plan, "LEAST_KEYS", 2)
    monkeypatch.setattr(cuda_plan, "choose_splits", lambda pairs, tokens, blocks: splits)
    model = random_model(6, channels=48, head_dim=16, img_size=10, layers_per_block=2)
    z, condition = random_latents(model, 3), Condition(None, GUIDED)
    for dtype, tolerance in ((torch.float32, GOLDEN), (torch.bfloat16, 0.1)):
        engine = engine_of(model, 0, dtype)
        assert engine.plan(6).splits == splits
        assert_close(inverse(engine, z, condition)[0], expected(model, 0, z, condition)[0], tolerance)


# Parallel passes


@pytest.mark.parametrize("guidance", [Guidance(), GUIDED], ids=["unguided", "guided"])
def test_a_window_of_more_rows_than_a_launch_takes(guidance: Guidance) -> None:
    """A pass reads the tokens as they were before it, also those that an earlier launch of it has written."""
    model = random_model(6, num_classes=2, img_size=12, head_dim=16, channels=32)  # T = 36
    T, z = model.config.num_patches, random_latents(model, 3)
    labels = torch.tensor([0, -1, 1])
    engine = engine_of(model)
    state = engine.begin(z, Condition(labels, guidance))
    alone = [engine.begin(z[b : b + 1], Condition(labels[b : b + 1], guidance)) for b in range(3)]
    for _ in range(3):
        moved = engine.fixed_point(state, 1, T)
        for b, each in enumerate(alone):
            for row, wanted in zip(moved, engine.fixed_point(each, 1, T), strict=True):
                assert_close(row[b], wanted[0], BATCH)
            assert_close(state.x[b], each.x[0], BATCH)
    weights = {name: value.double() for name, value in model.state_dict().items()}
    density, _ = reference.block_density(weights, 0, state.x.double().cpu(), labels, head_dim=16)
    if not guidance.active:
        moved = engine.fixed_point(state, 1, T)
        assert_close(moved.residual, (density - z).abs().amax(-1)[:, 1:], GOLDEN)
