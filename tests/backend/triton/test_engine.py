"""The Triton engine around its kernels: what it launches, what a pass returns, and what cannot be had."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import KERNEL_DEVICE, random_latents, random_model
from tolerances import GOLDEN, assert_close
from triton_engines import SHAPE, engine_of

from tarflow_fast import BackendError, NonFiniteError, Sampler
from tarflow_fast.backend import choose_backend
from tarflow_fast.backend.triton import plan as triton_plan
from tarflow_fast.backend.triton.engine import TritonEngine
from tarflow_fast.backend.triton.workspace import Size, Window
from tarflow_fast.engine import Condition, Guidance
from tarflow_fast.engine.backend import Request
from tarflow_fast.errors import ArgumentError
from tarflow_fast.kernels import affine_step, cached_attention, fixed_point_update, norm_linear
from tarflow_fast.kernels.launch import launch, recording


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


def test_a_batch_begins_with_counters_that_are_zero() -> None:
    """A split kernel that was broken off leaves some that are not, and every sum after it would lack parts."""
    model = random_model(img_size=4)
    engine, z = engine_of(model), random_latents(model, 2)
    spent = engine.begin(z, Condition())
    engine.fixed_point(spent, 1, 3)
    for window in spent.cache.windows.values():
        window.scratch.arrived.fill_(1)
    state = engine.begin(z, Condition(), reuse=spent)
    assert len(state.cache.windows) == 2
    assert not any(window.scratch.arrived.any() for window in state.cache.windows.values())


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


# What cannot be had


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float64}, "the Triton engine has no float64; use float32, bfloat16 or float16"),
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
    with pytest.raises(BackendError, match="backend 'triton' cannot be had: the Triton engine needs a CUDA device"):
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
