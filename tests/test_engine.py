"""Engines: every backend's two passes against the reference, token by token."""

from __future__ import annotations

import itertools
import shutil
from typing import Any

import pytest
import torch
from cases import GOLDEN as CASES
from cases import KERNEL_DEVICE, Case, cuda_kernel_missing, random_latents, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import GOLDEN, INVERSE_F64, SAME_F64, assert_close, error_budget, max_error
from torch import Tensor

from tarflow_fast import Sampler, reference
from tarflow_fast.backend import make_engines
from tarflow_fast.backend.cpu.engine import cpu_missing
from tarflow_fast.engine import BlockEngine, BlockState, Condition, Guidance
from tarflow_fast.engine.backend import Request
from tarflow_fast.errors import ArgumentError
from tarflow_fast.models.tarflow import TarFlow
from tarflow_fast.solvers import sequential

GUIDED = Guidance(1.5, "ab", 0.7, True)
CPU = torch.device("cpu")
NATIVE = pytest.param("cpu", marks=pytest.mark.skipif(cpu_missing() is not None, reason=str(cpu_missing())))
NO_CUDA = cuda_kernel_missing()
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(NO_CUDA is not None, reason=str(NO_CUDA)))
BACKENDS = ["torch", NATIVE, "triton", CUDA]
RAGGED = ["torch", NATIVE, CUDA]


def engine_of(model: TarFlow, k: int = 0, backend: str = "torch", dtype: torch.dtype = torch.float32) -> BlockEngine:
    weights = model.block_weights(k)
    device = KERNEL_DEVICE if backend in ("triton", "cuda") else CPU
    return make_engines(backend, [weights], Request(device, dtype, False))[0]


def poisoned(engine: BlockEngine, z: Tensor, condition: Condition) -> BlockState:
    """A state in which everything that the engine has yet to write is NaN."""
    state = engine.begin(z, condition)
    state.x[:, 1:] = torch.nan
    state.token_log_det[:, 1:] = torch.nan
    for holder in (state.cache, *getattr(state.cache, "windows", {}).values()):
        for name in ("keys_values", "x", "token_log_det", "h", "queries", "attended", "hidden", "parameters"):
            if isinstance(getattr(holder, name, None), Tensor):
                getattr(holder, name).fill_(torch.nan)
    return state


def memory_held(data: st.DataObject, dtype: torch.dtype) -> float:
    """What a cache was before it was written to: no number, or one whose products overflow."""
    held: float = data.draw(st.sampled_from([torch.nan, torch.finfo(dtype).max]))
    return held


def expected(
    model: TarFlow, k: int, z: Tensor, condition: Condition, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """x and token log-dets by the reference, evaluated in that dtype and in the block's order."""
    weights = {name: value.to(dtype) for name, value in model.state_dict().items()}
    rule = condition.guidance
    flip = k % 2 == 1
    x, log_det = reference.block_inverse(
        weights,
        k,
        z.to(dtype).flip(1) if flip else z.to(dtype),
        condition.labels,
        guidance=rule.scale,
        guide_what=rule.what,
        attn_temp=rule.attn_temp,
        annealed_guidance=rule.annealed,
        head_dim=model.config.head_dim,
    )
    return (x.flip(1) if flip else x), log_det


RULES = [Guidance(), GUIDED, Guidance(2.0, "a"), Guidance(0.5, "b", 1.3)]


def with_rules(backend: str, marks: Any = ()) -> list[Any]:
    """Triton's interpreter takes seconds for each; what is guided is the update kernel's, which has its own tests."""
    long = RULES[2:] if backend == "triton" and KERNEL_DEVICE.type == "cpu" else []
    return [
        pytest.param(
            backend, rule, marks=[*marks, *([pytest.mark.slow] if rule in long else [])], id=f"{rule}-{backend}"
        )
        for rule in RULES
    ]


@pytest.mark.parametrize(
    ("backend", "guidance"),
    [
        *with_rules("torch"),
        *with_rules("cpu", NATIVE.marks),
        *with_rules("triton"),
        *with_rules("cuda", CUDA.marks),
    ],
)
@pytest.mark.parametrize(
    ("batch", "k", "sizes"),
    [
        (1, 0, {"img_size": 6}),
        (3, 1, {"num_classes": 4, "channels": 128, "layers_per_block": 2, "img_size": 6}),
        (5, 1, {"in_channels": 3, "img_size": 6, "patch_size": 2, "head_dim": 32}),
        (2, 0, {"img_size": 15, "patch_size": 5, "num_classes": 2, "head_dim": 16, "channels": 48}),
        (2, 0, {"num_classes": 2, "nvp": False}),
        (4, 0, {"img_size": 4, "patch_size": 4}),
    ],
    ids=str,
)
def test_reverse_equals_the_reference(
    backend: str, guidance: Guidance, batch: int, k: int, sizes: dict[str, int]
) -> None:
    model = random_model(3, **sizes)
    labels = torch.arange(-1, batch - 1).clamp(max=1) if model.config.num_classes else None
    condition = Condition(labels, guidance)
    z = random_latents(model, batch)
    given_z = z.clone()
    engine = engine_of(model, k, backend)
    state = poisoned(engine, z, condition)
    engine.reverse(state)
    x, log_det = expected(model, k, z, condition)
    assert_close(state.x, x, GOLDEN)
    assert_close(state.token_log_det, log_det, GOLDEN)
    assert_close(state.log_det, log_det.sum(1), GOLDEN)
    assert torch.equal(z, given_z)


@pytest.mark.parametrize("backend", ["torch"])
@pytest.mark.parametrize("guidance", [Guidance(), GUIDED], ids=["unguided", "guided"])
def test_float64_inverts_exactly(backend: str, guidance: Guidance) -> None:
    model = random_model(5, torch.float64, num_classes=3)
    condition = Condition(torch.tensor([0, -1, 2]), guidance)
    z = random_latents(model, 3)
    engine = engine_of(model, 1, backend, torch.float64)
    state = poisoned(engine, z, condition)
    engine.reverse(state)
    assert_close(state.x, expected(model, 1, z, condition)[0], INVERSE_F64)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("torch", torch.bfloat16),
        ("torch", torch.float16),
        pytest.param("cpu", torch.bfloat16, marks=NATIVE.marks),
        ("triton", torch.bfloat16),
        ("triton", torch.float16),
        pytest.param("cuda", torch.bfloat16, marks=CUDA.marks),
        pytest.param("cuda", torch.float16, marks=CUDA.marks),
    ],
)
@pytest.mark.parametrize("guidance", [Guidance(), GUIDED], ids=["unguided", "guided"])
def test_half_precision_is_as_good_as_the_same_dtype_in_pytorch(
    backend: str, dtype: torch.dtype, guidance: Guidance
) -> None:
    """Engine against the reference evaluated in the half dtype, both against the exact result."""
    model = random_model(7, num_classes=3, layers_per_block=2, img_size=6)
    condition = Condition(torch.tensor([0, 1, -1]), guidance)
    z = random_latents(model, 3)
    engine = engine_of(model, 0, backend, dtype)
    state = poisoned(engine, z, condition)
    engine.reverse(state)
    exact, _ = expected(model, 0, z, condition)
    weights = {name: value.to(dtype) for name, value in model.state_dict().items()}
    plain, _ = reference.block_inverse(
        weights,
        0,
        z.to(dtype),
        condition.labels,
        guidance=guidance.scale,
        attn_temp=guidance.attn_temp,
        annealed_guidance=guidance.annealed,
    )
    assert max_error(state.x, exact) <= error_budget(plain, exact, dtype)


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
@pytest.mark.parametrize("guidance", [Guidance(), GUIDED], ids=["unguided", "guided"])
@FEW_TOKENS
@settings(max_examples=3)
@given(data=st.data())
def test_fixed_point_of_the_kernels(backend: str, guidance: Guidance, img_size: int, data: st.DataObject) -> None:
    """The same law. Windows of other sizes are summed in another order."""
    check_windows(backend, torch.float32, GOLDEN, guidance, data, img_size)


def check_windows(
    backend: str, dtype: torch.dtype, tolerance: float, guidance: Guidance, data: st.DataObject, img_size: int = 6
) -> None:
    """Windows [start, stop) repeated stop − start times, one after the other, give the sequential result."""
    model = random_model(11, dtype, num_classes=2, img_size=img_size)
    T = model.config.num_patches
    cuts = sorted({1, T, *data.draw(st.lists(st.integers(1, T), max_size=4))})
    condition = Condition(torch.tensor([1, -1]), guidance)
    z = random_latents(model, 2, seed=data.draw(st.integers(0, 9)))
    engine = engine_of(model, 0, backend, dtype)
    wanted = poisoned(engine, z, condition)
    engine.reverse(wanted)
    state = engine.begin(z, condition)
    state.cache.keys_values.fill_(memory_held(data, dtype))
    for start, stop in itertools.pairwise(cuts):
        for passes in range(stop - start):
            before = state.x.clone()
            moved = engine.fixed_point(state, start, stop)
            assert moved.change.shape == moved.residual.shape == (2, stop - start)
            assert_close(moved.change, (state.x - before)[:, start:stop].abs().amax(-1), 0.0)
            assert torch.equal(state.x[:, stop:], before[:, stop:])
            # after p passes the first p tokens of the window are final
            assert_close(state.x[:, : start + passes + 1], wanted.x[:, : start + passes + 1], tolerance)
    assert_close(state.token_log_det[:, 1:], wanted.token_log_det[:, 1:], tolerance)


# Parts of the tokens


def assert_same(got: Tensor, wanted: Tensor) -> None:
    """Bit for bit, or NaN in both."""
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


def check_parts(
    backend: str, dtype: torch.dtype, tolerance: float, guidance: Guidance, data: st.DataObject, img_size: int = 6
) -> None:
    """Any parts, each by either pass, are the whole; what is beyond a part stays as it is, and is not looked at."""
    model = random_model(11, dtype, num_classes=2, img_size=img_size, layers_per_block=2)
    T = model.config.num_patches
    cuts = sorted([1, T, *data.draw(st.lists(st.integers(1, T), max_size=4))])
    condition = Condition(torch.tensor([1, -1]), guidance)
    z = random_latents(model, 2, seed=data.draw(st.integers(0, 9)))
    engine = engine_of(model, 0, backend, dtype)
    wanted = poisoned(engine, z, condition)
    engine.reverse(wanted)
    state = poisoned(engine, z, condition)
    for start, stop in itertools.pairwise(cuts):
        before, log_det = state.x.clone(), state.token_log_det.clone()
        steps = [0]
        if start == stop or data.draw(st.booleans()):
            engine.reverse(state, steps.append, start, stop)
            assert sum(steps) == stop - start
        else:
            for _ in range(stop - start):
                engine.fixed_point(state, start, stop)
        outside = torch.ones(T, dtype=torch.bool)
        outside[start:stop] = False
        assert_same(state.x[:, outside], before[:, outside])
        assert_same(state.token_log_det[:, outside], log_det[:, outside])
    assert_close(state.x, wanted.x, tolerance)
    assert_close(state.token_log_det, wanted.token_log_det, tolerance)
    assert state.first_nonfinite().tolist() == [T, T]


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
    model = random_model(img_size=4)
    engine = engine_of(model, 0, backend)
    state = engine.begin(random_latents(model, 2), Condition())
    with pytest.raises(ArgumentError, match=r"^start, stop: expected integers with 1 <= start < stop <= 4"):
        engine.fixed_point(state, *window)
    assert torch.equal(state.x, state.z)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("part", [(0, 1), (3, 2), (1, 5), (5, 5), (1.0, 2), ([1, 1], [2, 2])], ids=repr)
def test_a_part_outside_the_sequence_is_refused(backend: str, part: tuple[Any, Any]) -> None:
    model = random_model(img_size=4)
    engine = engine_of(model, 0, backend)
    state = engine.begin(random_latents(model, 2), Condition())
    with pytest.raises(ArgumentError, match=r"^start, stop: expected integers with 1 <= start <= stop <= 4"):
        engine.reverse(state, None, *part)
    assert torch.equal(state.x, state.z)


# A window for each sample


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_engine_says_whether_it_takes_a_window_for_each_sample(backend: str) -> None:
    model = random_model(img_size=4)
    engine = engine_of(model, 0, backend)
    state = engine.begin(random_latents(model, 2), Condition())
    assert engine.ragged == (backend != "triton")
    if engine.ragged:
        engine.fixed_point(state, [1, 1], [3, 2])
    else:
        with pytest.raises(ArgumentError, match=r"^start, stop: expected integers .*, got \(\[1, 1\], \[3, 2\]\)"):
            engine.fixed_point(state, [1, 1], [3, 2])


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


# Laws of every pass


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("guidance", [Guidance(), GUIDED], ids=["unguided", "guided"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e38])
def test_a_token_depends_on_the_tokens_before_it_alone(backend: str, guidance: Guidance, bad: float) -> None:
    """Also where a later one of the window, or a stale one behind it in the cache, overflows."""
    model = random_model(11, num_classes=2, img_size=6)
    condition = Condition(torch.tensor([1, -1]), guidance)
    z, T = random_latents(model, 2), model.config.num_patches
    engine = engine_of(model, 0, backend)
    wanted, spoilt = (engine.begin(z, condition) for _ in range(2))
    spoilt.x[0, 4] = bad
    for state in (wanted, spoilt):
        engine.fixed_point(state, 1, T)
    assert torch.equal(spoilt.x[0, :5], wanted.x[0, :5])
    assert torch.equal(spoilt.x[1], wanted.x[1])
    assert not torch.equal(spoilt.x[0, 5:], wanted.x[0, 5:])
    assert bad == 1e38 or spoilt.x[0, 5:].isnan().all()
    spoilt.x[0, 4:] = wanted.x[0, 4:]
    for state in (wanted, spoilt):  # the cache behind the window is still spoilt
        engine.fixed_point(state, 2, 4)
        engine.fixed_point(state, 4, T)
    assert torch.equal(spoilt.x, wanted.x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("nvp", [True, False])
def test_the_residual_is_that_of_the_tokens_before_the_pass(backend: str, nvp: bool) -> None:
    model = random_model(11, img_size=6, nvp=nvp)
    engine, T = engine_of(model, 0, backend), model.config.num_patches
    state = engine.begin(random_latents(model, 3), Condition())
    weights = {name: value.double() for name, value in model.state_dict().items()}
    for _ in range(3):
        z, _ = reference.block_density(weights, 0, state.x.double().cpu())
        moved = engine.fixed_point(state, 1, T)
        assert_close(moved.residual, (z - state.z.cpu()).abs().amax(-1)[:, 1:], GOLDEN)


NO_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


@pytest.mark.filterwarnings("ignore:TensorFloat32")  # advice of torch.compile on a GPU
@pytest.mark.parametrize("guidance", [Guidance(), GUIDED], ids=["unguided", "guided"])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=[NO_COMPILER, pytest.mark.slow])])
def test_compiled_step_equals_eager(compiler: str, guidance: Guidance, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a second state beside the first: on a GPU the step is a CUDA graph, which is made for one address.

    aot_eager is of torch.compile what comes before code is generated, which takes half a minute.
    """
    if compiler == "aot_eager":
        plain = torch.compile
        monkeypatch.setattr(
            torch, "compile", lambda step, dynamic, mode: plain(step, dynamic=dynamic, backend=compiler)
        )
    model = random_model(2, num_classes=2)
    weights = model.block_weights(0)
    condition = Condition(torch.tensor([0, -1], device=KERNEL_DEVICE), guidance)
    latents = [random_latents(model, 2, seed).to(KERNEL_DEVICE) for seed in (0, 1)]
    passes = []
    for compile in (False, True):
        engine = make_engines("torch", [weights], Request(KERNEL_DEVICE, torch.float32, compile))[0]
        states = [engine.begin(z, condition) for z in latents]
        for state in states:
            engine.reverse(state)
        for state in states:  # from token 3 on once more, after a pass that left NaN in the cache behind it
            state.x[:, 6] = torch.nan
            engine.fixed_point(state, 1, model.config.num_patches)
            assert state.x[:, 7:].isnan().all()
            engine.reverse(state, start=3)
        passes.append(states)
    for eager, compiled in zip(*passes, strict=True):
        assert_close(compiled.x, eager.x, GOLDEN)
        assert_close(compiled.token_log_det, eager.token_log_det, GOLDEN)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_around_an_engine_changes_nothing(backend: str) -> None:
    model = random_model(img_size=6)
    z = random_latents(model, 2)
    engine = engine_of(model, 0, backend)
    plain, under = engine.begin(z, Condition()), engine.begin(z, Condition())
    engine.reverse(plain)
    with torch.autocast("cpu", torch.bfloat16):
        engine.reverse(under)
    assert torch.equal(plain.x, under.x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_spent_cache_is_taken_over_if_it_fits(backend: str) -> None:
    """Only its memory: not its contents, and what the other block made stays as it is."""
    model = random_model(img_size=6)
    z = random_latents(model, 3)
    first, second = (engine_of(model, k, backend) for k in (1, 0))
    spent = first.begin(z, Condition())
    first.reverse(spent)
    made = spent.x.clone()
    spent.cache.keys_values.fill_(torch.nan)
    state = second.begin(spent.x, Condition(), reuse=spent)
    assert state.cache.keys_values.data_ptr() == spent.cache.keys_values.data_ptr()
    second.reverse(state)
    assert_close(state.x, expected(model, 0, made, Condition())[0], GOLDEN)
    assert torch.equal(spent.x, made)
    other = second.begin(z[:2], Condition(), reuse=spent)
    assert other.cache.keys_values.data_ptr() != spent.cache.keys_values.data_ptr()


@pytest.mark.parametrize("backend", BACKENDS)
def test_progress_counts_every_step(backend: str) -> None:
    model = random_model(img_size=6)
    engine = engine_of(model, 0, backend)
    steps: list[int] = []
    sequential(engine, engine.begin(random_latents(model, 2), Condition()), steps.append)
    assert sum(steps) == model.config.num_patches - 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("guided", [False, True])
def test_bytes_per_sample_covers_the_cache(backend: str, guided: bool) -> None:
    model = random_model(num_classes=2)
    engine = engine_of(model, 0, backend)
    state = engine.begin(random_latents(model, 3), Condition(None, GUIDED if guided else Guidance()))
    assert state.cache_bytes == state.cache.keys_values.nbytes
    assert 3 * engine.bytes_per_sample(guided) >= state.cache_bytes + state.z.nbytes + state.x.nbytes


# Whole images


def of_kernels(case: Case) -> list[Any]:
    """A golden case for both. Triton's interpreter takes many seconds for each, so that most of them are slow tests."""
    long = KERNEL_DEVICE.type == "cpu" and case.name not in ("vp", "cond_cfg_b")
    triton = pytest.param("triton", case, marks=[pytest.mark.slow] if long else [], id=f"{case.name}-triton")
    return [triton, pytest.param("cuda", case, marks=CUDA.marks, id=f"{case.name}-cuda")]


@pytest.mark.parametrize(("backend", "case"), [each for case in CASES for each in of_kernels(case)])
def test_golden_images(backend: str, case: Case) -> None:
    y = None if case.y is None else case.y.to(KERNEL_DEVICE)
    sampler = Sampler(case.model(), backend=backend, device=KERNEL_DEVICE)
    images = sampler.reverse(case.tensor("in.z").to(KERNEL_DEVICE), y, **case.reverse_args)
    assert isinstance(images, torch.Tensor)
    assert_close(images, case.tensor("out.reverse"), GOLDEN)


@pytest.mark.parametrize("backend", ["triton", CUDA])
def test_samples_and_their_likelihood_are_those_of_the_torch_backend(backend: str) -> None:
    model = random_model(num_classes=3, img_size=6)
    ours, wanted = (
        Sampler(model, backend=name, device=KERNEL_DEVICE).sample(3, [0, -1, 2], batch_size=2)
        for name in (backend, "torch")
    )
    assert_close(ours.images, wanted.images, GOLDEN)
    assert ours.log_prob is not None
    assert wanted.log_prob is not None
    assert_close(ours.log_prob, wanted.log_prob, 1e-3)
    assert (ours.report.backend, ours.report.backend_reason) == (backend, "asked for")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"scale": -1.0}, "guidance"),
        ({"scale": float("nan")}, "guidance"),
        ({"scale": "2"}, "guidance"),
        ({"what": "c"}, "guide_what"),
        ({"what": ""}, "guide_what"),
        ({"attn_temp": 0.0}, "attn_temp"),
        ({"attn_temp": -1}, "attn_temp"),
        ({"annealed": 2}, "annealed_guidance"),
    ],
)
def test_guidance_that_cannot_be_is_refused(arguments: dict[str, object], name: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{name}: expected"):
        Guidance(**arguments)  # type: ignore[arg-type]
