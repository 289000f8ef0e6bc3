"""The emulation's model of time: small kernels take what its parameters say, and a step is the sum of its parts.

Nothing here is a measurement: what is tested is that the model does what csrc/cuda/emulation/timing.h says of it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cuda_depth
import cuda_emulation
import pytest
import torch

from tarflow_fast.backend.cuda import engine as cuda_engine
from tarflow_fast.models.config import TarFlowConfig

if cuda_emulation.compiler_missing() is not None:
    pytest.skip(str(cuda_emulation.compiler_missing()), allow_module_level=True)

# The defaults of emulation/timing.h, in cycles.
CLOCK, DRAM, L2, L1, SHARED, FENCE, TENSOR, PAIR = 1.83e9, 479, 263, 41, 29, 1000, 33, 180
ISSUE = 4  # cycles of the two instructions of a load
DEFAULTS = {"dram": 4.3e12, "l2": 5.6e12, "l2_bytes": 40e6, "fence": FENCE, "sinks": 0}


@functools.cache
def native() -> Any:
    sources = [Path(__file__).parent / "timed_kernels.cpp", *cuda_emulation.SOURCES.glob("emulation/*.cpp")]
    return cuda_emulation.build("timed_kernels", sources, ["-DTARFLOW_TIMED"])


@pytest.fixture(autouse=True)
def _defaults() -> Iterator[None]:
    yield
    cuda_depth.set_gpu(native(), **DEFAULTS)


def cycles(
    kernel: str, start: int, *, stop: int = 1, mode: int = 0, blocks: int = 1, warps: int = 1, **gpu: float
) -> float:
    """What the model says that a launch takes. gpu: parameters that are others than by default."""
    cuda_depth.set_gpu(native(), **{**DEFAULTS, **gpu})
    buffers = {"x": torch.ones(1 << 16), "z": torch.zeros(64), "barrier": torch.zeros(1, dtype=torch.int32)}
    memory = {name: (tensor.data_ptr(), tensor.numel()) for name, tensor in buffers.items()}
    native().run(kernel, {"start": start, "stop": stop, "mode": mode}, memory, blocks, warps)
    return cuda_depth.last_timing(native()).microseconds * 1e-6 * CLOCK


@pytest.mark.slow
def test_loads_that_wait_for_each_other_take_a_latency_each() -> None:
    serial = cycles("loads", 9) - cycles("loads", 1)
    assert serial == pytest.approx(8 * (DRAM + ISSUE), rel=0.03)
    together = cycles("loads", 9, mode=1) - cycles("loads", 1, mode=1)
    assert together < 8 * 3 * ISSUE


def test_a_vector_is_waited_for_where_it_is_stored() -> None:
    """Also one of which no element is looked at."""
    assert cycles("moves", 9) - cycles("moves", 1) == pytest.approx(8 * (DRAM + 2 * ISSUE), rel=0.05)


def test_a_load_may_sink_to_its_first_use_unless_it_is_held() -> None:
    """As a compiler may move it; sync_warp is there to hold it."""
    alone = cycles("loads", 1, mode=1, sinks=1)
    assert cycles("loads", 9, mode=1, sinks=1) - alone == pytest.approx(8 * (DRAM + ISSUE), rel=0.03)
    assert cycles("loads", 9, mode=2, sinks=1) - alone < DRAM / 2


def test_a_load_takes_the_latency_of_the_level_that_has_it() -> None:
    """The second time the L2 cache does, if it is large enough; a constant is in the multiprocessor's own."""

    def second(kernel: str, **gpu: float) -> float:
        return (cycles(kernel, 8, stop=2, **gpu) - cycles(kernel, 8, **gpu)) / 8

    assert second("loads") == pytest.approx(L2 + ISSUE, rel=0.03)
    assert second("loads", l2_bytes=64.0) == pytest.approx(DRAM + ISSUE, rel=0.03)
    assert second("constants") == pytest.approx(L1 + ISSUE, rel=0.03)
    assert (cycles("in_shared", 16) - cycles("in_shared", 8)) / 8 == pytest.approx(SHARED + ISSUE, rel=0.05)


@pytest.mark.parametrize(
    ("gpu", "rate"), [({}, 64.0), ({"dram": 16 * CLOCK}, 16.0), ({"l2": 32 * CLOCK}, 32.0)], ids=["port", "DRAM", "L2"]
)
def test_bytes_pass_at_the_rate_of_the_slowest_level(gpu: dict[str, float], rate: float) -> None:
    more = cycles("stream", 16, warps=8, **gpu) - cycles("stream", 8, warps=8, **gpu)
    assert more == pytest.approx(8 * 256 * 16 / rate, rel=0.05)


def test_products_wait_for_their_sums() -> None:
    chain = (cycles("products", 16) - cycles("products", 8)) / 8
    assert chain == pytest.approx(TENSOR, rel=0.25)
    assert (cycles("products", 16, mode=1) - cycles("products", 8, mode=1)) / 8 < TENSOR / 2


def test_a_barrier_costs_a_fence_and_waits_for_the_last_block() -> None:
    def each(mode: int = 0, **gpu: float) -> float:
        few, many = (cycles("barriers", count, blocks=3, mode=mode, **gpu) for count in (2, 6))
        return (many - few) / 4

    assert each(fence=2 * FENCE) - each() == pytest.approx(FENCE, rel=0.01)
    assert FENCE + L2 < each() < FENCE + 4 * L2
    assert each(mode=1) > each() + 5000


def test_what_is_sent_is_got_without_a_fence() -> None:
    """On the way to the L2 cache and back, and as late as the look that finds it."""

    def each(**gpu: float) -> float:
        return (cycles("answers", 22, blocks=2, **gpu) - cycles("answers", 2, blocks=2, **gpu)) / 20

    assert L2 < each() < 2.5 * L2
    assert each(fence=2 * FENCE) == pytest.approx(each(), rel=0.05)


def test_a_copy_for_both_blocks_of_a_pair_leaves_the_l2_cache_once() -> None:
    """Each takes half of what both need, or all of it."""

    def each(mode: int) -> float:
        few, many = (cycles("bulk", count, mode=mode, blocks=2, warps=1, l2=32 * CLOCK) for count in (12, 20))
        return (many - few) / 8

    assert each(0) == pytest.approx(2 * 1024 / 32, rel=0.05)
    assert each(1) == pytest.approx(1024 / 32, rel=0.05)


def test_an_arrival_at_another_blocks_gate_takes_the_way_between_two_multiprocessors() -> None:
    each = (cycles("arrivals", 22, blocks=2) - cycles("arrivals", 2, blocks=2)) / 20
    assert PAIR < each < PAIR + 2 * SHARED


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> cuda_depth.Case:
    monkeypatch.setattr(cuda_engine, "load_native", cuda_engine.load_native)  # which cuda_depth sets, and this undoes
    return cuda_depth.Case(TarFlowConfig(1, 8, 2, 64, 2, 3), 2, guided=False)


def test_a_step_is_the_sum_of_its_phases(case: cuda_depth.Case) -> None:
    timing = cuda_depth.step(case)
    assert timing.microseconds == pytest.approx(timing.spent.sum())
    assert timing.microseconds == pytest.approx(timing.causes.sum())
    phases = dict(zip(cuda_depth.PHASES, timing.spent.sum(1), strict=True))
    assert all(phases[name] > 0 for name in cuda_depth.PHASES if name != "update")
    text = cuda_depth.table("small", timing, "H200")
    assert f"small: {timing.microseconds:.1f} µs on H200 parameters — a model's figure, not a measurement" in text


@pytest.mark.parametrize(("batch", "barriers"), [(2, 5 * 3 + 2), pytest.param(33, 3 + 2, marks=pytest.mark.slow)])
def test_a_step_has_its_barriers(case: cuda_depth.Case, batch: int, barriers: int) -> None:
    """5 L + 2 of few rows and L + 2 of many, each of which costs a fence more where a fence does."""
    case = replace(case, batch=batch)
    dear = 10 * FENCE  # so that it counts for little where the memory of the host lies
    more = cuda_depth.step(case, fence=FENCE + dear).microseconds - cuda_depth.step(case, fence=FENCE).microseconds
    assert more == pytest.approx(barriers * dear / CLOCK * 1e6, rel=0.02 if batch == 2 else 0.1)


def test_the_model_is_refused_a_parameter_that_it_does_not_have() -> None:
    with pytest.raises(KeyError, match="speed"):
        cuda_depth.set_gpu(native(), speed=1.0)
