"""The engines of GPUs go through the probe without one: CUDA's in its emulation, Triton's in Triton's interpreter.

The same checks, of smaller blocks; a process of its own makes them where the test is marked slow.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import KERNEL_DEVICE, cuda_kernel_missing
from probe_backends import EMULATED, INTERPRETED
from probe_jobs import job_of, run_here

from tarflow_fast.devices import triton_missing
from tarflow_fast.engine.shape import BlockShape
from tarflow_fast.engine.verdict import Row, Size
from tarflow_fast.probe import laws, parent
from tarflow_fast.probe.subject import Subject

ON_GPU = KERNEL_DEVICE.type == "cuda"  # there `tarflow-fast check` tries them as they are
IN_EMULATION = pytest.mark.skipif(ON_GPU or cuda_kernel_missing() is not None, reason=str(cuda_kernel_missing()))
INTERPRETING = pytest.mark.skipif(ON_GPU or triton_missing() is not None, reason=str(triton_missing()))
TINY = BlockShape(tokens=5, token_dim=2, channels=16, layers=1, heads=1, head_dim=16, hidden=32, classes=2)
CROSSING = BlockShape(tokens=131, token_dim=2, channels=16, layers=1, heads=1, head_dim=16, hidden=32)
"""131 tokens: more than one round of keys, and steps on either side of token 128."""


def failed(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.fault is not None]


@IN_EMULATION
@pytest.mark.parametrize("guided", [False, True])
def test_the_cuda_engine_passes(guided: bool) -> None:
    rows, times = run_here(job_of(EMULATED, Size(2, guided), TINY, repeats=2))
    assert failed(rows) == []
    assert {"accuracy", "converge", "ragged windows"} <= {row.check.partition(", batch")[0] for row in rows}
    assert times.keys() == {"torch", "emulated"}


@INTERPRETING
@pytest.mark.parametrize("law", ["accuracy", "inputs unchanged"])
def test_the_triton_engine_passes(law: str) -> None:
    job = job_of(INTERPRETED, Size(1, True), TINY, repeats=2)
    finding = laws.check(Subject(job, TINY), laws.Case(law, TINY, job.size))
    assert finding.fault is None


@IN_EMULATION
def test_a_broken_launch_of_the_cuda_engine_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The right kernel with a wrong number: what the probe is for is the device's part of the work."""
    from tarflow_fast.backend.cuda.engine import CudaEngine

    plain = CudaEngine._run

    def wrong(self: CudaEngine, state: Any, positions: Any, buffers: Any, **sizes: int) -> None:
        if "start" in sizes and sizes["start"] > 1:
            sizes["start"] -= 1  # a step too early
        plain(self, state, positions, buffers, **sizes)

    monkeypatch.setattr(CudaEngine, "_run", wrong)
    rows, _ = run_here(job_of(EMULATED, Size(2, False), TINY, repeats=2))
    assert "accuracy, batch 2" in {row.check for row in failed(rows)}


@pytest.mark.slow
@IN_EMULATION
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_cuda_engine_passes_in_a_process_of_its_own(dtype: torch.dtype) -> None:
    verdict = parent.probe(job_of(EMULATED, Size(2, False), CROSSING, repeats=2, dtype=dtype))
    assert verdict.proven, verdict.reason


@pytest.mark.slow
@INTERPRETING
def test_the_triton_engine_passes_in_a_process_of_its_own() -> None:
    shape = BlockShape(tokens=20, token_dim=2, channels=16, layers=1, heads=1, head_dim=16, hidden=32, classes=2)
    verdict = parent.probe(job_of(INTERPRETED, Size(3, False), shape, repeats=2))
    assert verdict.proven, verdict.reason
