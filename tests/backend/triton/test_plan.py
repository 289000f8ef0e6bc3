"""Which tiles the Triton engine takes: candidates, how they are timed, and where a choice is kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import random_latents, random_model
from triton_engines import SHAPE, TUNED, engine_of

from tarflow_fast import OutOfMemoryError, cache
from tarflow_fast.backend.triton import engine as triton_engine
from tarflow_fast.backend.triton import plan as triton_plan
from tarflow_fast.backend.triton.engine import TOKENS_PER_GRAPH
from tarflow_fast.engine import Condition, Guidance
from tarflow_fast.engine.contract import BlockState
from tarflow_fast.kernels import cached_attention, norm_linear

SHAPES = [
    SHAPE,
    *(replace(SHAPE, rows=rows, pairs=12 * rows, samples=rows) for rows in (1, 2, 3, 4, 5, 64, 200, 4096)),
    replace(SHAPE, dtype=torch.float32, head_dim=128, token_dim=3, channels=128, hidden=512, pairs=32),
    replace(SHAPE, window=7, rows=224),
    replace(SHAPE, window=64, rows=2048, head_dim=32),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.rows}-{s.window}-{s.head_dim}")
def test_candidates_are_tiles_that_the_kernels_take(shape: triton_plan.PassShape) -> None:
    """Powers of two; tensor cores have their sixteen rows; no choice is there twice; splits have something to share."""
    for name, tiles in triton_plan.candidates(shape).items():
        assert tiles, name
        assert len(set(tiles)) == len(tiles), name
        for tile in tiles:
            assert all(value & (value - 1) == 0 for value in vars(tile).values() if value != 3), (name, tile)
            if isinstance(tile, norm_linear.Tile):
                assert tile.rows >= 16 or (tile.rows <= norm_linear.FEW_ROWS and tile.splits == 1)
                assert tile.splits * tile.depth <= 4 * max(shape.channels, tile.depth)
            if isinstance(tile, cached_attention.Tile):
                assert tile.window == 1 if shape.window == 1 else tile.window >= 16
                assert tile.splits * tile.tokens <= shape.tokens


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.rows}-{s.window}-{s.head_dim}")
def test_attention_may_have_more_keys_under_way_where_they_fit_on_every_gpu(shape: triton_plan.PassShape) -> None:
    tiles = triton_plan.attention_tiles(shape)
    assert tiles[0].stages == 2
    assert {tile.stages for tile in tiles} == ({2, 3, 4} if shape.window == 1 else {2})
    assert all(tile.shared_bytes(shape.head_dim, shape.dtype) <= 99 * 1024 for tile in tiles)
    wide = replace(shape, head_dim=256, dtype=torch.float32, window=1)
    assert all(tile.shared_bytes(256, torch.float32) <= 99 * 1024 for tile in triton_plan.attention_tiles(wide))


def test_tuning_finds_the_quickest_of_each() -> None:
    among = triton_plan.candidates(SHAPE)
    costs = {(name, tile): (7 * i) % 11 for name, tiles in among.items() for i, tile in enumerate(tiles)}
    slow = among["fc1"][0]

    def seconds(plan: triton_plan.Plan) -> float | None:
        if plan.fc1 == slow:
            return None  # as if it did not fit
        return 100.0 + sum(costs[name, getattr(plan, name)] for name in among)

    plan = triton_plan.tune(among, seconds)
    for name, tiles in among.items():
        usable = [tile for tile in tiles if (name, tile) != ("fc1", slow)]
        if name in ("attention", "qkv"):  # tried while nothing could run: the first choice stays
            assert getattr(plan, name) == tiles[0]
        else:
            assert costs[name, getattr(plan, name)] == min(costs[name, tile] for tile in usable), name
    with pytest.raises(OutOfMemoryError, match="no choice of tiles fits"):
        triton_plan.tune(among, lambda plan: None)


def test_a_choice_is_kept_for_its_device_and_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path))
    plan = triton_plan.Plan(**{name: tiles[-1] for name, tiles in triton_plan.candidates(SHAPE).items()})
    device = {"gpu": "NVIDIA H200"}
    assert triton_plan.read(SHAPE, device) is None
    triton_plan.write(SHAPE, device, plan)
    assert triton_plan.read(SHAPE, device) == plan
    assert triton_plan.read(SHAPE, {"gpu": "another"}) is None
    assert triton_plan.read(replace(SHAPE, rows=33), device) is None
    (file,) = (tmp_path / "tiles").iterdir()
    assert json.loads(file.read_text())["device"] == device
    for spoilt in ("", "[]", '{"plan": {}}'):
        file.write_text(spoilt)
        assert triton_plan.read(SHAPE, device) is None


def test_the_folder_of_choices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(cache.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / "tarflow_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_folder() == Path.home() / ".cache" / "tarflow_fast"


def test_tuning_a_step_compiles_measures_and_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the clock of a GPU, and for its name."""
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "made up")
    monkeypatch.setattr("tarflow_fast.kernels.launch.Launch.compile", lambda self: compiled.append(self))
    monkeypatch.setattr(triton_engine, "timed", lambda run, before: timings.append(before()) or 1.0 / len(timings))
    compiled: list[Any] = []
    timings: list[Any] = []
    model = random_model(img_size=8, num_classes=2)
    engine = engine_of(model)
    state: BlockState = engine.begin(random_latents(model, 2), Condition(None, Guidance(1.0)))
    shape = engine._shape(state.cache.size, 1)
    plan = TUNED(engine, state.cache, shape)
    among = triton_plan.candidates(shape)
    choices = sum(map(len, among.values()))
    assert len(compiled) == choices - len(among["update"]) + len(among["step"])  # which embeds the first token too
    assert len(timings) == choices - 7  # eight operations, and their first choices are one plan
    assert plan == triton_plan.Plan(**{n: tiles[-1] for n, tiles in triton_plan.candidates(shape).items()})
    assert state.cache.position.item() == (16 - TOKENS_PER_GRAPH) // 2
    timings.clear()
    assert TUNED(engine, state.cache, shape) == plan
    assert not timings  # from disk
    monkeypatch.setattr(triton_plan, "read", lambda shape, device: None)
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="the choice of tiles could not be kept"):
        TUNED(engine, state.cache, shape)
