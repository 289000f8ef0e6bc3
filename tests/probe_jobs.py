"""Small jobs for the tests of the probe."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from engines import CPU

from tarflow_fast.engine.backend import Backend
from tarflow_fast.engine.shape import BlockShape
from tarflow_fast.engine.verdict import Row, Size, Verdict
from tarflow_fast.probe import child
from tarflow_fast.probe.job import EngineJob, Job

SHAPE = BlockShape(tokens=12, token_dim=2, channels=8, layers=1, heads=1, head_dim=8, hidden=16, classes=2)
ASKED = Size(3, False)
LONG = BlockShape(tokens=144, token_dim=2, channels=8, layers=1, heads=1, head_dim=8, hidden=16)


def job_of(backend: Backend, size: Size = ASKED, shape: BlockShape = SHAPE, repeats: int = 6, **more: Any) -> EngineJob:
    return EngineJob(
        backend, "torch", CPU, more.pop("dtype", torch.float32), "highest", (shape,), size, repeats, **more
    )


def run_here(job: Job) -> tuple[list[Row], dict[str, float]]:
    """The rows and times that a process of its own would tell of, in this one."""
    rows: list[Row] = []
    times: dict[str, float] = {}

    def tell(event: str, **facts: Any) -> None:
        if event == "done":
            rows.append(Row(**facts))
        elif event == "timed":
            times.update(facts["seconds"])

    child.run(job, tell)
    return rows, times


def probe_here(job: Job, limits: object = None, on_row: Any = None) -> Verdict:
    """The verdict of a probe in this process, with fewer repeats: for faults that harm nobody."""
    try:
        rows, times = run_here(replace(job, repeats=8))
    except ImportError as error:
        rows, times = [Row("starting", fault=f"it raised ImportError: {error}")], {}
    for row in rows:
        if on_row is not None:
            on_row(row, len(rows))
    fault = next((f"{row.check}: {row.fault}" for row in rows if row.fault is not None), None)
    return Verdict(fault is None, fault or f"{len(rows)} checks passed", times, tuple(rows))
