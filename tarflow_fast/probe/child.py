"""The process in which a probe runs: it may crash, hang or spoil its device's context, and nobody else is harmed.

It takes a job, pickled, from its standard input, and tells of each check on its standard output, a line of JSON each,
before the check begins and when it is done. Whatever else writes to the standard output goes to the standard error.
"""

from __future__ import annotations

import faulthandler
import json
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from tarflow_fast.probe import child; child.main()"
"""What the process is started with. It finds modules where its parent does, and never runs the parent's script."""


def main() -> None:
    """Do the job, and end the process."""
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    faulthandler.enable()

    def tell(event: str, **facts: Any) -> None:
        told.write(json.dumps({"event": event, **facts}) + "\n")
        told.flush()

    size = int(sys.stdin.buffer.readline())
    job = sys.stdin.buffer.read(size)
    threading.Thread(target=_end_with_parent, args=(sys.stdin.buffer,), daemon=True).start()
    tell("begin", check="starting")
    try:
        run(pickle.loads(job), tell)
    except BaseException as error:
        _tell_failure(tell, error)
    told.close()
    os._exit(0)  # what is left of a broken device's context is not torn down


def _end_with_parent(stdin: BinaryIO) -> None:
    """End this process when its parent has gone, which closes the pipe."""
    stdin.read()
    os._exit(1)


def run(job: Any, tell: Callable[..., None]) -> None:
    """Make all checks of a job and tell of each; then, if all has gone well, of the times."""
    import torch

    from .job import EngineJob

    with torch.no_grad():
        if isinstance(job, EngineJob):
            _run_engine(job, tell)
        else:
            _run_density(job, tell)
    tell("end")


def _run_engine(job: Any, tell: Callable[..., None]) -> None:
    import torch

    from . import laws
    from .subject import Subject

    if job.device.type == "cuda":
        torch.cuda.set_device(job.device)
    # The precision is for what is compared in fp32; what is exact is then fp64, and for half precision it is fp32.
    torch.set_float32_matmul_precision(job.precision if job.dtype == torch.float32 else "highest")
    subjects = {shape: Subject(job, shape) for shape in job.shapes}
    good = _checks(laws.cases(job), lambda case: laws.check(subjects[case.shape], case), tell)
    if good:
        shape = max(job.shapes, key=lambda shape: shape.tokens * shape.channels)
        tell("begin", check="timing")
        tell("timed", seconds=_times(job, subjects[shape]))


def _times(job: Any, subject: Any) -> dict[str, float]:
    """Returns the time of a piece of the sequential pass of the default backend and of the one that is probed."""
    from ..backend.registry import backend_named
    from ..engine.timing import seconds
    from .laws import timed_run

    default = backend_named(job.default).maker(subject.request)(subject.weights)
    engines = {job.default: default, job.name: subject.engine}
    runs = {name: timed_run(engine, subject, job.size) for name, engine in engines.items()}
    taken = [{name: seconds(engines[name], run) for name, run in runs.items()} for _ in range(2)]  # they take turns
    return {name: min(each[name] for each in taken) for name in runs}


def _run_density(job: Any, tell: Callable[..., None]) -> None:
    import torch

    from . import density

    if job.device.type == "cuda":
        torch.cuda.set_device(job.device)
    from ..kernels.affine_density import affine_density

    _checks(density.density_cases(), lambda case: density.check_density(job, affine_density, case), tell)


def _checks(cases: Sequence[Any], check: Callable[[Any], Any], tell: Callable[..., None]) -> bool:
    """Make these checks and tell of each. Returns whether all went well."""
    tell("cases", count=len(cases))
    good = True
    for case in cases:
        tell("begin", check=case.name)
        started = time.perf_counter()
        finding = check(case)
        tell("done", check=case.name, seconds=time.perf_counter() - started, **finding._asdict())
        good = good and finding.fault is None
    return good


def _tell_failure(tell: Callable[..., None], error: BaseException) -> None:
    import torch

    from ..errors import OutOfMemoryError, first_line

    memory = isinstance(error, (MemoryError, OutOfMemoryError, torch.OutOfMemoryError))
    tell("failed", reason=f"it raised {type(error).__name__}: {first_line(error)}", memory=memory)
