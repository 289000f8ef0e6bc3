"""The native CPU engine, beyond what tests/test_engine.py asks of every backend: each instruction set that this machine
has, bit-equal results for any number of threads and any batch, interruption, several callers at once."""

from __future__ import annotations

import functools
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import random_latents, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import GUIDED, expected, poisoned
from tolerances import BF16_BIAS, BF16_BITS, BF16_IMAGE, GOLDEN, assert_close, error_budget, max_error
from torch import Tensor

import tarflow_fast as tff
from tarflow_fast.backend import backends, choose_backend
from tarflow_fast.backend.cpu.engine import CpuEngine, cpu_missing
from tarflow_fast.checkpoints.checkpoint import load_pretrained
from tarflow_fast.engine import BlockState, Condition, Guidance
from tarflow_fast.engine.backend import Request
from tarflow_fast.errors import ArgumentError, BackendError
from tarflow_fast.models.tarflow import TarFlow
from tarflow_fast.native import ISA_VARIABLE, choose_instruction_set, instruction_sets, load_native
from tarflow_fast.sampling.sampler import Sampler

if cpu_missing() is not None:
    pytest.skip(str(cpu_missing()), allow_module_level=True)

CPU = torch.device("cpu")
SETS = instruction_sets()
UNGUIDED = Guidance()
every_set = pytest.mark.parametrize("isa", SETS)


def engine_of(model: TarFlow, k: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> CpuEngine:
    return CpuEngine(model.block_weights(k), dtype=dtype, **options)


def inverse(engine: CpuEngine, z: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
    state = poisoned(engine, z, condition)
    engine.reverse(state)
    return state.x, state.token_log_det


def elementary(name: str, isa: str, x: Tensor) -> Tensor:
    out = torch.full_like(x, torch.nan)
    load_native().elementary(name, isa, x.data_ptr(), out.data_ptr(), x.numel())
    return out


@every_set
def test_gelu(isa: str) -> None:
    """Within 3e-7 (2e-7 with fused multiply-add) and one rounding of the exact value; NaN stays NaN."""
    x = torch.linspace(-12, 12, 160_000)
    exact = 0.5 * x.double() * torch.special.erfc(-x.double() / math.sqrt(2))
    error = (elementary("gelu", isa, x).double() - exact).abs()
    assert (error <= 3e-7 + 6e-8 * exact.abs()).all(), error.max()
    assert elementary("gelu", isa, torch.full((16,), torch.nan)).isnan().all()
    assert torch.equal(elementary("gelu", isa, torch.full((16,), 1e30)), torch.full((16,), 1e30))


@every_set
def test_exp(isa: str) -> None:
    """For x <= 0, relative error of 2e-7 down to exp(−87), and 0 below."""
    x = torch.linspace(-87, 0, 160_000)
    exact = x.double().exp()
    assert ((elementary("exp", isa, x).double() - exact).abs() <= 2e-7 * exact).all()
    assert torch.equal(elementary("exp", isa, torch.zeros(16)), torch.ones(16))
    low = torch.tensor([-88.0, -1e4, -1e30, -torch.inf]).repeat(4)
    assert torch.equal(elementary("exp", isa, low), torch.zeros(16))
    assert elementary("exp", isa, torch.full((16,), torch.nan)).isnan().all()


SHAPES = [
    {"channels": 128, "layers_per_block": 2, "num_classes": 3},  # two heads of 64
    {"channels": 96, "head_dim": 32, "in_channels": 3, "img_size": 6},
    {"channels": 128, "head_dim": 128, "img_size": 14, "patch_size": 2},  # one head; T = 49: several blocks of keys
    {"channels": 35, "head_dim": 7, "img_size": 10, "patch_size": 5, "layers_per_block": 2},  # nothing is even
    {"channels": 48, "head_dim": 16, "img_size": 6, "patch_size": 3, "num_classes": 2, "nvp": False},
    {"channels": 64, "img_size": 26, "patch_size": 2},  # T = 169: more than one chunk of keys
]


@dataclass(frozen=True)
class Problem:
    """Latents for block 1 of a model, and what the reference makes of them in float64."""

    model: TarFlow
    z: Tensor
    condition: Condition

    @classmethod
    def of(cls, sizes: dict[str, Any], guidance: Guidance = UNGUIDED, seed: int = 3) -> Problem:
        return _problem(tuple(sizes.items()), guidance, seed)

    @cached_property
    def exact(self) -> tuple[Tensor, Tensor]:
        return expected(self.model, 1, self.z, self.condition)

    @cached_property
    def in_bf16(self) -> Tensor:
        """By the same expression in PyTorch."""
        return expected(self.model, 1, self.z, self.condition, torch.bfloat16)[0]


@functools.lru_cache(maxsize=2)  # instruction sets come one after the other
def _problem(sizes: tuple[tuple[str, Any], ...], guidance: Guidance, seed: int) -> Problem:
    model = random_model(seed, **dict(sizes))
    labels = torch.tensor([0, -1, 1]) if model.config.num_classes else None
    return Problem(model, random_latents(model, 3), Condition(labels, guidance))


@every_set
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
@pytest.mark.parametrize("guidance", [Guidance(), GUIDED], ids=["unguided", "guided"])
def test_shapes(isa: str, sizes: dict[str, Any], guidance: Guidance) -> None:
    problem = Problem.of(sizes, guidance)
    engine = engine_of(problem.model, 1, instruction_set=isa, threads=1)
    for got, wanted in zip(inverse(engine, problem.z, problem.condition), problem.exact, strict=True):
        assert_close(got, wanted, GOLDEN)


@every_set
@pytest.mark.parametrize(("heads", "threads"), [(1, 2), (2, 3), (3, 2), (4, 3), (5, 3)])
def test_any_number_of_threads_shares_any_number_of_heads(isa: str, heads: int, threads: int) -> None:
    """Threads of one team, with whole heads each or not: equal to one thread, from a cache of NaNs, time after time."""
    model = random_model(8, channels=16 * heads, head_dim=16, layers_per_block=2)
    z = random_latents(model, 3)
    engine = engine_of(model, 0, instruction_set=isa, threads=1)
    wanted = inverse(engine, z, Condition())
    assert_close(wanted[0], expected(model, 0, z, Condition())[0], GOLDEN)
    engine.threads = threads
    for _ in range(3):
        assert all(map(torch.equal, inverse(engine, z, Condition()), wanted))


@every_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("guidance", [Guidance(), GUIDED], ids=["unguided", "guided"])
def test_every_batch_and_thread_count_gives_the_same_bits(isa: str, dtype: torch.dtype, guidance: Guidance) -> None:
    """All tiles of rows, both ways of dividing work, batches in several groups: equal to each sample alone."""
    model = random_model(4, num_classes=3, img_size=6, layers_per_block=2, channels=128)
    z = random_latents(model, 101)
    labels = torch.arange(101) % 4 - 1
    engine = engine_of(model, 0, dtype, instruction_set=isa, threads=1)
    alone = [inverse(engine, z[i : i + 1], Condition(labels[i : i + 1], guidance)) for i in range(101)]
    x, log_det = (torch.cat(parts) for parts in zip(*alone, strict=True))
    if dtype == torch.float32:
        assert_close(x, expected(model, 0, z, Condition(labels, guidance))[0], GOLDEN)
    for batch in (*range(1, 26), 48, 65, 101):
        engine.threads = 1 + batch % 3
        got = inverse(engine, z[:batch], Condition(labels[:batch], guidance))
        assert torch.equal(got[0], x[:batch]), batch
        assert torch.equal(got[1], log_det[:batch]), batch


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


def test_a_nan_is_seen() -> None:
    """What is not finite is not hidden by a maximum or a clamp: it reaches x, and the change of a fixed point."""
    model = random_model(6)
    engine = engine_of(model)
    state = engine.begin(random_latents(model, 2), Condition())
    state.x[1, 0, 0] = torch.nan
    engine.reverse(state)
    assert state.x[0].isfinite().all()
    assert state.x[1, 1:].isnan().all()
    change = engine.fixed_point(state, 1, model.config.num_patches).change
    assert change[1].isnan().all()
    assert not change[0].any()


def check_bf16(problem: Problem, isa: str) -> None:
    """The error is at most that of the same expression in PyTorch's bf16, twice, and one rounding."""
    engine = engine_of(problem.model, 1, torch.bfloat16, instruction_set=isa)
    x, _ = inverse(engine, problem.z, problem.condition)
    exact, _ = problem.exact
    assert max_error(x, exact) <= error_budget(problem.in_bf16, exact, torch.bfloat16)


@every_set
@pytest.mark.parametrize("guidance", [Guidance(), GUIDED], ids=["unguided", "guided"])
@pytest.mark.parametrize("seed", range(3))
def test_bf16_is_as_good_as_pytorch(isa: str, guidance: Guidance, seed: int) -> None:
    check_bf16(Problem.of({"num_classes": 3, "layers_per_block": 2, "channels": 128}, guidance, seed), isa)


@every_set
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_bf16_shapes(isa: str, sizes: dict[str, Any]) -> None:
    check_bf16(Problem.of(sizes), isa)


@every_set
def test_bf16_rounding_has_no_bias(isa: str) -> None:
    """Weights, keys and values are rounded to nearest: cut off, they would be smaller by 0.07 % or more on average."""
    model = random_model(9, channels=128)
    z = random_latents(model, 16)
    sizes = []
    for dtype in (torch.float32, torch.bfloat16):
        engine = engine_of(model, 0, dtype, instruction_set=isa)
        state = engine.begin(z, Condition())
        state.cache.keys_values.zero_()
        engine.fixed_point(state, 1, model.config.num_patches)  # of the same tokens
        sizes.append(state.cache.keys_values.double().abs().sum())
    assert abs(sizes[1] / sizes[0] - 1) <= BF16_BIAS


@every_set
def test_bf16_on_the_shipped_model(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained weights: nearly the same images as in fp32, and of bf16 images the sampler reports the log-density that
    they have under the fp32 model."""
    monkeypatch.setenv(ISA_VARIABLE, isa)
    model, labels = load_pretrained(), torch.arange(10)
    exact, half = (Sampler(model, backend="cpu", dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    for guidance in (0.0, 1.0):
        a, b = (sampler.sample(10, labels, guidance=guidance) for sampler in (exact, half))
        assert 0 < (a.images - b.images).abs().mean((1, 2, 3)).median() <= BF16_IMAGE
    reported = half.sample(10, labels)
    assert reported.log_prob is not None
    with torch.no_grad():
        wanted = model.bits_per_dim(reported.images, labels)
    got = 7 - reported.log_prob / (28 * 28 * math.log(2))
    assert ((got - wanted).abs() <= BF16_BITS * wanted).all()


def test_several_callers_at_once() -> None:
    model = random_model(5, num_classes=3, img_size=16, channels=128)
    engine = engine_of(model, threads=2)
    latents = [random_latents(model, 1 + seed % 3, seed) for seed in range(12)]
    wanted = [inverse(engine, z, Condition())[0] for z in latents]
    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(lambda z: inverse(engine, z, Condition())[0], latents))
    assert all(map(torch.equal, got, wanted))


def long_run() -> tuple[CpuEngine, Tensor]:
    """Several seconds of work."""
    model = random_model(5, img_size=64, channels=256, layers_per_block=2)
    return engine_of(model, threads=2), random_latents(model, 64)


@pytest.mark.parametrize("parallel", [False, True], ids=["sequential", "parallel"])
def test_ctrl_c_interrupts_within_a_second(parallel: bool) -> None:
    """A second in which this process computes: other processes may take the cores for as long as they like."""
    engine, z = long_run()
    state = engine.begin(z, Condition())
    stops = range(1024 - 63, 1025)
    run = (lambda: engine.fixed_point(state, [1] * 64, stops)) if parallel else (lambda: engine.reverse(state))
    sent = []

    def interrupt() -> None:
        begun = time.process_time()
        while time.process_time() < begun + 0.3:  # of the pass, as nothing else is computed meanwhile
            time.sleep(0.01)
        sent.append(time.process_time())
        os.kill(os.getpid(), signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs without
    try:
        interrupter.start()
        with pytest.raises(KeyboardInterrupt):
            run()
        assert time.process_time() - sent[0] < 1
    finally:
        interrupter.join()
        signal.signal(signal.SIGINT, handler)
    small = random_model()
    z = random_latents(small, 2)
    wanted, _ = expected(small, 0, z, Condition())
    assert_close(inverse(engine_of(small, threads=2), z, Condition())[0], wanted, GOLDEN)  # the threads are still well


def test_what_progress_raises_ends_the_pass() -> None:
    engine, z = long_run()

    def refuse(steps: int) -> None:
        raise LookupError(steps)

    with pytest.raises(LookupError):
        engine.reverse(engine.begin(z, Condition()), refuse)


def test_progress_counts_a_long_pass() -> None:
    model = random_model(5, img_size=24, channels=128)
    engine, steps = engine_of(model, threads=2), []
    engine.reverse(engine.begin(random_latents(model, 150), Condition()), steps.append)
    assert sum(steps) == model.config.num_patches - 1
    assert min(steps) > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_has_threads_of_its_own() -> None:
    code = """
import os, sys, torch
sys.path[:0] = sys.argv[1:]
from test_cpu_engine import engine_of, inverse, random_latents, random_model, Condition
model = random_model(); z = random_latents(model, 2); engine = engine_of(model, threads=2)
wanted, _ = inverse(engine, z, Condition())
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(inverse(engine, z, Condition())[0], wanted) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    folder = os.path.dirname(__file__)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, folder], timeout=120, check=False)
    assert done.returncode == 0


def test_the_environment_chooses_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    monkeypatch.delenv(ISA_VARIABLE, raising=False)
    assert engine_of(model).instruction_set == choose_instruction_set() == SETS[0]
    for name in SETS:
        monkeypatch.setenv(ISA_VARIABLE, name)
        assert engine_of(model).instruction_set == name
        assert name in next(status.reason for status in backends() if status.name == "cpu")
    monkeypatch.setenv(ISA_VARIABLE, "sse9")
    with pytest.raises(BackendError, match="TARFLOW_FAST_CPU_ISA: 'sse9' cannot be had here; choose one of"):
        engine_of(model)
    with pytest.raises(BackendError, match="sse9"):
        Sampler(model)
    assert not next(status for status in backends() if status.name == "cpu").available


def test_what_it_cannot_do_goes_to_torch_with_the_reason() -> None:
    assert choose_backend("auto", Request(CPU, torch.float32, False))[0] == "cpu"
    assert choose_backend("auto", Request(CPU, torch.bfloat16, False))[0] == "cpu"
    for dtype, compile, reason in (
        (torch.float64, False, "no float64"),
        (torch.float16, False, "no float16"),
        (torch.float32, True, "nothing to compile"),
    ):
        name, why = choose_backend("auto", Request(CPU, dtype, compile))
        assert name == "torch"
        assert reason in why
        with pytest.raises(BackendError, match=rf"backend 'cpu' cannot be had: .*{reason}.* or\s.*backend='torch'"):
            choose_backend("cpu", Request(CPU, dtype, compile))
    with pytest.raises(BackendError, match="cannot be had: it runs on the CPU, and this is cuda"):
        choose_backend("cpu", Request(torch.device("cuda"), torch.float32, False))


def test_without_the_compiled_module_torch_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tarflow_fast._cpu", None)
    name, why = choose_backend("auto", Request(CPU, torch.float32, False))
    assert name == "torch"
    assert "install a C++17 compiler" in why
    status = next(status for status in backends() if status.name == "cpu")
    assert not status.available
    assert status.reason == why
    with pytest.raises(BackendError, match="was not built"):
        Sampler(random_model(), backend="cpu")


def test_packed_weights_take_no_more_than_the_weights() -> None:
    model = random_model(channels=128, img_size=14, layers_per_block=2)
    count = sum(value.numel() for name, value in model.block_weights(0).layers[0].__dict__.items())
    for dtype in (torch.float32, torch.bfloat16):
        assert engine_of(model, 0, dtype).packed_bytes <= 1.1 * 2 * count * dtype.itemsize + 2**16


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux tells the peak")
@pytest.mark.parametrize("sizes", [(32, 64, 4, 2, 160), (16, 512, 8, 1, 1)], ids=["large batch", "large block"])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_peak_memory(dtype: str, sizes: tuple[int, ...]) -> None:
    """Making a sampler and drawing takes the packed weights, one KV cache, and at most 64 MB."""
    code = f"""
import sys, torch
sys.path[:0] = sys.argv[1:]
from cases import random_model
from tarflow_fast.sampling.sampler import Sampler

def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

img_size, channels, layers, blocks, batch = {sizes}
model = random_model(img_size=img_size, channels=channels, layers_per_block=layers, num_blocks=blocks)
model = model.to(torch.{dtype})
open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here on
before = kilobytes("VmRSS")
sampler = Sampler(model, backend="cpu", dtype=torch.{dtype})
report = sampler.sample(batch).report
taken = (kilobytes("VmHWM") - before) * 1024
packed = sum(engine.packed_bytes for engine in sampler.engines)
assert packed + report.cache_bytes > 40e6
print(taken - packed - report.cache_bytes)
"""
    arguments = [sys.executable, "-W", "ignore", "-c", code, os.path.dirname(__file__)]
    done = subprocess.run(arguments, timeout=120, check=True, capture_output=True, text=True)
    assert int(done.stdout) <= 64e6


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux tells the peak")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_of_a_model_and_its_sampler(tmp_path: Path, dtype: str) -> None:
    """Loading a model and making a sampler of it takes its tensors, and at most 1.2 times the packed weights."""
    path = tmp_path / "m.safetensors"
    tff.save(random_model(img_size=8, channels=512, layers_per_block=3, num_blocks=4), path)
    code = f"""
import sys, torch, tarflow_fast as tff
from tarflow_fast.sampling import Sampler

def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

Sampler(tff.TarFlow(1, 4, 2, 64, 1, 1), backend="cpu")  # what is done once
open("/proc/self/clear_refs", "w").write("5")
before = kilobytes("VmRSS")
model = tff.load(sys.argv[1])
sampler = Sampler(model, backend="cpu", dtype=torch.{dtype})
taken = (kilobytes("VmHWM") - before) * 1024
tensors = sum(value.nbytes for value in model.state_dict().values())
packed = sum(engine.packed_bytes for engine in sampler.engines)
assert tensors > 100e6
print(taken / (tensors + 1.2 * packed))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(path)], timeout=120, check=True, capture_output=True, text=True
    )
    assert float(done.stdout) <= 1


def test_refused_arguments() -> None:
    model = random_model()
    with pytest.raises(ArgumentError, match=r"^threads: expected"):
        engine_of(model, threads=0)
    engine = engine_of(model)
    with pytest.raises(ArgumentError, match=r"^z: expected"):
        engine.begin(torch.zeros(2, 3, 4), Condition())
    state = engine.begin(random_latents(model, 2), Condition())
    state.x = state.x.double()
    for run in (engine.reverse, lambda state: engine.fixed_point(state, 1, 2)):
        with pytest.raises(ArgumentError, match=r"^state\.x: expected"):
            run(state)


def test_the_sampler_hands_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled engine is asked for so many, and for torch's number, as it is then, where none was given."""
    asked: list[int] = []

    class Spy:
        def __init__(self, native: Any):
            self.native = native

        def __getattr__(self, name: str) -> Any:
            return getattr(self.native, name)

        def run(self, **arguments: Any) -> None:
            asked.append(arguments["threads"])
            self.native.run(**arguments)

    model = random_model(2)
    images = []
    for threads in (None, 3):
        sampler = Sampler(model, backend="cpu", threads=threads)
        for engine in sampler.engines:
            engine._native = Spy(engine._native)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        images.append(sampler.sample(3).images)
    assert asked == [2, 2, 3, 3]
    assert torch.equal(*images)


def test_the_sampler_takes_it_by_default() -> None:
    model = random_model(2, num_classes=3)
    ours, torchs = Sampler(model), Sampler(model, backend="torch")
    assert ours.backend == "cpu"
    a, b = (sampler.sample(5, [0, 1, 2], guidance=1.0) for sampler in (ours, torchs))
    assert_close(a.images, b.images, GOLDEN)
    assert a.report.backend == "cpu"
