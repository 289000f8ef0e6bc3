"""Small jobs for the tests of the probe."""

from __future__ import annotations

from typing import Any

import torch
from engines import CPU

from tarflow_fast.engine.backend import Backend
from tarflow_fast.engine.shape import BlockShape
from tarflow_fast.engine.verdict import Row, Size
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
