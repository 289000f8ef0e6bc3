"""The Triton engine around its kernels: golden images, workspaces, graphs, and how tiles are chosen and kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import KERNEL_DEVICE, random_latents, random_model
from tolerances import GOLDEN, assert_close

from tarflow_fast import BackendError, NonFiniteError, OutOfMemoryError, Sampler
from tarflow_fast.backend import choose_backend
from tarflow_fast.backend.pytorch.engine import TorchEngine
from tarflow_fast.backend.triton import engine as triton_engine
from tarflow_fast.backend.triton import plan as triton_plan
from tarflow_fast.backend.triton.engine import TOKENS_PER_GRAPH, TritonEngine
from tarflow_fast.backend.triton.workspace import KEPT, Pool, Size, Window, widened
from tarflow_fast.engine import Condition, Guidance
from tarflow_fast.engine.backend import Request
from tarflow_fast.engine.contract import BlockState
from tarflow_fast.errors import ArgumentError
from tarflow_fast.kernels import affine_step, cached_attention, fixed_point_update, norm_linear
from tarflow_fast.kernels.launch import launch, recording
from tarflow_fast.models.tarflow import TarFlow

ROOT = Path(__file__).parent.parent
TUNED = TritonEngine._tuned  # see conftest.py
ON_GPU = pytest.mark.skipif(KERNEL_DEVICE.type != "cuda", reason="there is no GPU")


def engine_of(model: TarFlow, k: int = 0, pool: Pool | None = None, **options: Any) -> TritonEngine:
    weights = model.block_weights(k)
    return TritonEngine(weights, device=KERNEL_DEVICE, dtype=torch.float32, pool=pool, **options)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_first_token_that_is_not_finite_is_named(backend: str) -> None:
    """Both backends say the same: block 0, sample 1, whose xa overflows after its token 2."""
    model = random_model(img_size=6)
    with torch.no_grad():
        model.blocks[0].proj_out.weight[0].fill_(50.0)
    z = random_latents(model, 3)
    sampler = Sampler(model, backend=backend, device=KERNEL_DEVICE)
    with pytest.raises(NonFiniteError) as raised:
        sampler.reverse(z.to(KERNEL_DEVICE))
    wanted = Sampler(model, backend="torch", dtype=torch.float32)
    with pytest.raises(NonFiniteError) as expected:
        wanted.reverse(z)
    found = [(error.value.block, error.value.token, error.value.sample) for error in (raised, expected)]
    assert found[0] == found[1]
    assert found[0][0] == 0


def test_a_first_token_that_is_not_finite_is_token_0() -> None:
    model = random_model(img_size=4)
    engine, z = engine_of(model), random_latents(model, 2)
    z[1, 0, 0] = torch.inf
    state = engine.begin(z, Condition())
    engine.reverse(state)
    assert state.nonfinite is not None  # seen in passing
    assert state.first_nonfinite().tolist() == [model.config.num_patches, 0]
    state.nonfinite = None
    assert state.first_nonfinite().tolist() == [model.config.num_patches, 0]  # the same, read off the tokens


def test_launches_of_a_step_are_what_the_engine_says() -> None:
    model = random_model(num_classes=2, layers_per_block=3, img_size=4)
    engine = engine_of(model)
    state = engine.begin(random_latents(model, 2), Condition(None, Guidance(1.0)))
    operations = engine.operations(state)
    assert len(operations) == engine.launches_per_token == 5 * 3 + 2
    assert [operation.name for operation in operations[:6]] == ["qkv", "attention", "proj", "fc1", "fc2", "qkv"]
    assert [operation.name for operation in operations[-2:]] == ["proj_out", "affine_step"]
    token = 2 * 4 * 64 * 4  # keys and values of a token in 4 rows
    assert operations[3].bytes == 4 * 64 * 64 * 4  # fc1's weight in fp32
    assert operations[1].bytes == token * (3 * 3 // 4 + 1)
    assert operations[0].bytes == 3 * 64 * 64 * 4 + token
    assert state.cache.position.item() == 3 * 3 // 4
    operations[0].run()


def test_a_chain_of_split_tiles_makes_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where every operation of a chain leaves its parts in one memory, one after the other."""
    model = random_model(num_classes=2, img_size=4)
    linear = norm_linear.Tile(16, 64, 16, splits=2)
    plan = triton_plan.Plan(
        attention=cached_attention.Tile(tokens=2, splits=8),
        step=affine_step.Tile(2, 32),
        update=fixed_point_update.Tile(4),
        **dict.fromkeys(("qkv", "fc1", "fc2", "proj", "proj_out"), linear),
    )
    states = []
    for split in (False, True):
        if split:
            monkeypatch.setattr(TritonEngine, "_new_window", lambda self, w, tokens: Window(w.size, tokens, plan, 8))
        engine = engine_of(model)
        states.append(engine.begin(random_latents(model, 2), Condition(None, Guidance(1.0))))
        engine.reverse(states[-1])
    scratch = states[1].cache.windows[1].scratch
    assert scratch.partial.numel() == 2 * 16 * 256  # of fc1, the widest
    assert not scratch.arrived.any()
    assert_close(states[1].x, states[0].x, GOLDEN)


def test_scratch_memory_suffices_for_attention() -> None:
    size = Size(random_model().config.block_shape, torch.float32, KERNEL_DEVICE, 3, 2)
    tile = cached_attention.Tile(tokens=2, splits=8)
    plan = replace(triton_plan.interpreted(SHAPE), attention=tile)
    values, counters = tile.scratch(6, 1, 1, 64)
    scratch = Window(size, 1, plan, 8).scratch
    assert (scratch.partial.numel(), scratch.arrived.numel()) == (values, counters)


def test_recording_launches_nothing() -> None:
    model = random_model(img_size=4)
    engine = engine_of(model)
    state = engine.begin(random_latents(model, 1), Condition())
    state.cache.x.fill_(torch.nan)
    with recording() as launches:
        engine.reverse(state)
    assert len(launches) == 1 + 3 * engine.launches_per_token
    assert state.cache.x[:, 1:].isnan().all()
    for each in launches[:2]:
        launch(each)


def test_what_a_pass_returns_is_its_own() -> None:
    """Not the workspace's memory, which the next pass, or the next block, writes to."""
    model = random_model(img_size=4)
    engine, z = engine_of(model), random_latents(model, 2)
    state = engine.begin(z, Condition())
    engine.reverse(state)
    found = [state.x, state.token_log_det, state.first_nonfinite(), *engine.fixed_point(state, 1, 3)]
    kept = [each.clone() for each in found]
    later = engine.begin(3 * z, Condition(), reuse=state)
    later.x[1, 0] = torch.inf
    engine.reverse(later)
    engine.fixed_point(later, 1, 3)
    assert later.cache is state.cache
    assert all(torch.equal(*pair) for pair in zip(found, kept, strict=True))


def test_a_parallel_pass_forgets_which_tokens_were_finite() -> None:
    model = random_model(img_size=4)
    engine = engine_of(model)
    state = engine.begin(random_latents(model, 2), Condition())
    engine.reverse(state)
    assert state.first_nonfinite().tolist() == [4, 4]
    state.x[1, 2] = torch.inf
    engine.fixed_point(state, 3, 4)
    assert state.first_nonfinite().tolist() == [4, 2]


def test_a_part_knows_the_first_token_that_is_not_finite_if_it_reaches_the_end() -> None:
    model = random_model(img_size=6)
    engine, z = engine_of(model), random_latents(model, 4)
    z[3, 6] = torch.inf
    state = engine.begin(z, Condition())
    engine.reverse(state)
    assert state.nonfinite is not None
    engine.reverse(state, start=2, stop=8)
    assert state.nonfinite is None
    assert state.first_nonfinite().tolist() == [9, 9, 9, 6]
    state.x[0, 2] = torch.nan  # before the part
    state.x[1, 4] = torch.nan  # the token that it begins with
    state.x[2, 5] = torch.nan  # filled anew
    engine.reverse(state, start=5, stop=5)
    assert state.nonfinite is None
    engine.reverse(state, start=5)
    assert state.nonfinite is not None
    assert state.first_nonfinite().tolist() == [2, 4, 9, 6]
    state.nonfinite = None
    assert state.first_nonfinite().tolist() == [2, 4, 9, 6]


# Workspaces


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


# Graphs


def test_launches_are_run_once_then_captured_then_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is played on a GPU, with a stand-in for its graphs."""
    model = random_model(img_size=4)
    engine = engine_of(model)
    window = engine._window(engine.begin(random_latents(model, 1), Condition()).cache, 1)
    log: list[str] = []

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    def capture(run: Any) -> Graph:
        log.append("capture")
        return Graph()

    monkeypatch.setattr(triton_engine, "capture", capture)
    engine.device = torch.device("cuda")
    for key in ("a", "a", "b", "a"):
        engine._play(window, key, lambda: log.append("run"))
    assert log == ["run", "capture", "replay", "run", "replay"]
    assert engine.setup_seconds > 0


def test_launches_that_failed_are_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their kernels may not be loaded, which cannot be done during capture."""
    model = random_model(img_size=4)
    engine = engine_of(model)
    window = engine._window(engine.begin(random_latents(model, 1), Condition()).cache, 1)
    monkeypatch.setattr(triton_engine, "capture", lambda run: pytest.fail("captured"))
    engine.device = torch.device("cuda")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            engine._play(window, "a", lambda: 1 // 0)  # type: ignore[arg-type, return-value]


def test_every_rule_has_graphs_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one workspace: what is guided is compiled into the kernels that a graph replays."""
    model = random_model(img_size=4)
    engine, played = engine_of(model), []
    monkeypatch.setattr(engine, "_play", lambda window, key, run: played.append((window, key)))
    for what in ("a", "b", "ab"):
        state = engine.begin(random_latents(model, 1), Condition(None, Guidance(1.0, what)))
        engine.reverse(state)
        engine.fixed_point(state, 1, 2)
        del state
    assert len({id(window) for window, _ in played}) == 1
    assert len({key for _, key in played}) == len(played) == 6


def test_tokens_are_run_in_graphs_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(img_size=10)
    engine, steps = engine_of(model), []
    monkeypatch.setattr(engine, "_play", lambda window, key, run: steps.append(key[1]))
    state = engine.begin(random_latents(model, 1), Condition())
    seen: list[int] = []
    engine.reverse(state, seen.append)
    assert steps == seen == [TOKENS_PER_GRAPH] * 3  # of T − 1 = 24 tokens
    engine.reverse(state, seen.append, 2, 12)
    assert steps[3:] == seen[3:] == [TOKENS_PER_GRAPH, 2]


@ON_GPU
def test_eager_steps_graphs_and_dependent_launch_agree() -> None:
    """Bit for bit: a first batch, run launch by launch, others from graphs, and one on another stream."""
    model = random_model(num_classes=3, img_size=10)
    condition = Condition(torch.tensor([0, -1, 2], device=KERNEL_DEVICE), Guidance(1.5, "ab", 0.7, True))
    z = random_latents(model, 3)
    results = []
    for pdl in (False, None):
        engine = engine_of(model, pdl=pdl)
        for stream in (torch.cuda.current_stream(), torch.cuda.current_stream(), torch.cuda.Stream()):
            with torch.cuda.stream(stream):
                state = engine.begin(z, condition)
                engine.reverse(state)
                results.append(state.x.cpu())
                del state
    assert torch.isfinite(results[0]).all()
    for other in results[1:]:
        assert torch.equal(other, results[0])


@ON_GPU
def test_passes_of_a_window_are_graphs_too() -> None:
    model = random_model(img_size=10)
    engine, z, T = engine_of(model), random_latents(model, 2), model.config.num_patches
    state = engine.begin(z, Condition())
    for start in range(1, T):
        engine.fixed_point(state, start, T)
    assert set(state.cache.windows) == {1, 2, 4, 8, 16, 24}
    wanted = engine.begin(z, Condition())
    engine.reverse(wanted)
    assert_close(state.x, wanted.x, GOLDEN)


@ON_GPU
def test_tuning_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(triton_plan.CACHE_VARIABLE, str(tmp_path))
    model = random_model(img_size=8, layers_per_block=2)
    engine = engine_of(model)
    state = engine.begin(random_latents(model, 2), Condition())
    shape = engine._shape(state.cache.size, 1)
    plan = TUNED(engine, state.cache, shape)
    assert all(getattr(plan, name) in tiles for name, tiles in triton_plan.candidates(shape).items())
    assert engine.setup_seconds > 0


# What cannot be had


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float64}, "the Triton kernels have no float64; use float32, bfloat16 or float16"),
        ({"compile": True}, "torch.compile has nothing to compile in the Triton engine"),
        ({"threads": 2}, "threads is for backend 'cpu', and this is 'triton'"),
    ],
    ids=str,
)
def test_requests_that_cannot_be_met_say_why(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        Sampler(random_model(), backend="triton", device=KERNEL_DEVICE, **options)


def test_without_a_gpu_it_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tarflow_fast.kernels.launch.interpreting", lambda: False)
    with pytest.raises(BackendError, match="backend 'triton' cannot be had: Triton kernels need a CUDA device"):
        choose_backend("triton", Request(torch.device("cpu"), torch.float32, False))


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(BackendError, match="a C compiler, and there is none"):
        choose_backend("triton", Request(KERNEL_DEVICE, torch.float32, False))


@pytest.mark.skipif(KERNEL_DEVICE.type == "cuda", reason="a GPU may have it")
def test_pdl_that_cannot_be_had_is_refused() -> None:
    with pytest.raises(BackendError, match="pdl=True cannot be had"):
        engine_of(random_model(), pdl=True)


def test_latents_of_another_shape_are_refused() -> None:
    model = random_model()
    with pytest.raises(ArgumentError, match=r"^z: expected shape \(B, 16, 4\)"):
        engine_of(model).begin(torch.zeros(2, 15, 4), Condition())


# Tiles

SHAPE = triton_plan.PassShape(
    rows=32,
    pairs=384,
    samples=16,
    window=1,
    tokens=1024,
    channels=768,
    hidden=3072,
    token_dim=192,
    out_dim=384,
    head_dim=64,
    dtype=torch.bfloat16,
    multiprocessors=132,
)
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
    monkeypatch.setenv(triton_plan.CACHE_VARIABLE, str(tmp_path))
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
    monkeypatch.delenv(triton_plan.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert triton_plan.cache_folder() == tmp_path / "tarflow_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert triton_plan.cache_folder() == Path.home() / ".cache" / "tarflow_fast"


def test_tuning_a_step_compiles_measures_and_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the clock of a GPU, and for its name."""
    monkeypatch.setenv(triton_plan.CACHE_VARIABLE, str(tmp_path))
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
    monkeypatch.setenv(triton_plan.CACHE_VARIABLE, str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="the choice of tiles could not be kept"):
        TUNED(engine, state.cache, shape)


# Without a GPU: what the kernels compile to


def compile_all(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "bench", "kernels", *arguments]
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, cwd=ROOT, env={**inherited, **environment}, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "90", "100"])
def test_kernels_compile_for_every_architecture_without_spills(architecture: str) -> None:
    done = compile_all("--only", "triton", "--arch", architecture)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    names = "norm_linear cached_attention affine_step fixed_point_update affine_density affine_density_backward"
    kernels = {f"{name}_kernel" for name in names.split()}
    assert {row[0] for row in rows} >= kernels
    assert {row[1] for row in rows} == {architecture}
    assert all(int(row[3]) == 0 for row in rows)


def test_the_interpreter_compiles_nothing() -> None:
    done = compile_all(TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert "TRITON_INTERPRET is set" in done.stderr
