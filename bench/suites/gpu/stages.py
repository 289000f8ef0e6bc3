"""The stages of `bench gpu`, each of which is a process of its own: a kernel that hangs, crashes or leaves a process
without a GPU costs its own stage, and nothing else.

`python -m bench.suites.gpu.stages NAME REQUEST FILE` does a stage; the request and what it leaves in FILE are JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tarflow_fast.probe.processes import run_all

from ...common import harness, limits, ml_tarflow
from ...common.machine import ROOT
from ...common.record import values
from . import cases
from .cases import DTYPE, Case, Inputs

COMMAND = (sys.executable, "-m", "bench.suites.gpu.stages")
INSIDE_SHARE = 0.25  # of the time for a sampling cell, for the inside of each engine
BASELINE_SHARE = 0.25  # of the time for a cell: a baseline that takes longer than this is not run again
SLACK = {cases.BASELINE: 2.0}  # under autocast it rounds exp(xa) too: its error is up to 2.7 times the torch backend's
DENSITY_TOLERANCE = 0.01  # of the loss and of the gradient's norm, relative to the exact ones
PATIENCE = 60.0  # seconds that the run of the tests may take longer than each of them


def run_tests(seconds: float) -> Any:
    """Returns {passed, failed, seconds, ok, tail} of the tests that run on a GPU, which are stopped after `seconds`."""
    command = (sys.executable, "tests/on_gpu.py", str(seconds))
    return json.loads(run_all({"tests": command}, seconds + PATIENCE, ROOT)["tests"].output.splitlines()[-1])


def in_process(name: str, request: dict[str, Any], seconds: float) -> Any:
    """Returns what a stage leaves, which is done in a process of its own and stopped after `seconds`.

    Raises RuntimeError if it leaves nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        left = Path(folder) / "left.json"
        done = run_all({name: (*COMMAND, name, json.dumps(request), str(left))}, seconds, ROOT)[name]
        if done.code != 0:
            raise RuntimeError(f"its process ended with {done.code}: {' '.join(done.tail[-1:])}")
        return json.loads(left.read_text(encoding="utf-8"))


def here(name: str, request: dict[str, Any], seconds: float = 0.0) -> Any:
    """Returns what a stage leaves, which is done in this process."""
    return STAGES[name](torch.device("cpu" if request.pop("dry") else "cuda"), **request)


def launches(device: torch.device, repeat: int) -> Any:
    from . import inside  # it needs Triton

    return inside.measure_launches(harness.Rounds(repeat, 1.0, device))


def cell(device: torch.device, case: Any, repeat: int, seconds: float, seed: int, checkout: str, **part: bool) -> Any:
    """Returns {cell, failures, seconds}: a cell, what went wrong in it, and what compiling and all else took.

    part: whether "compiled" and "cuda" take part. A failure must not cost the rest, as minutes on a GPU are dear.
    """
    started, noted, this = time.monotonic(), list[str](), Case(**case)
    rounds, theirs = harness.Rounds(repeat, seconds, device), ml_tarflow.MlTarflow.load(Path(checkout))

    def guard(what: str, run: Callable[[], Any]) -> Any:
        try:
            return run()
        except Exception as error:
            noted.append(f"{what}: {harness.in_a_line(error)}")
            return None

    def measure() -> Any:
        inputs = Inputs.of(this, device, seed)
        how: dict[str, Any] = {"all_or_none": False, "once": {cases.BASELINE: BASELINE_SHARE}}
        if this.kind == "density":  # results are taken in units of the exact ones
            exact, candidates = cases.densities(this, inputs, theirs, device)
            how |= {"view": lambda result: result / exact, "tolerance": DENSITY_TOLERANCE}
            return harness.measure_cell(this, candidates, rounds, exact=torch.ones_like(exact), **how)
        from . import inside

        exact = cases.exact_images(this, inputs, device)
        how |= {"exact": exact, "yardstick": (cases.TORCH, DTYPE), "slack": SLACK}
        candidates = cases.samplers(this, inputs, theirs, device, **part)
        found: Any = harness.measure_cell(this, candidates, rounds.share(1 - 2 * INSIDE_SHARE), **how)
        of = (this, inputs, exact, found["check"]["tolerance"], rounds.share(INSIDE_SHARE))
        found["engine"] = guard("kernels", lambda: inside.measure_engine(*of))
        if part["cuda"]:
            found["cuda"] = guard("CUDA engine", lambda: inside.measure_cuda(*of))
        return found

    made = guard(values(unknown(this), " "), measure) or unknown(this)
    compiling = sum(run["first_seconds"] for run in made["runs"] if run["name"] == cases.COMPILED)
    return {"cell": made, "failures": noted, "seconds": [compiling, time.monotonic() - started - compiling]}


def unknown(case: Case) -> Any:
    """Returns the cell of a case that could not be measured."""
    return harness.unmeasured(case, harness.check_of("see the failures below"))


STAGES: dict[str, Callable[..., Any]] = {
    "limits": lambda device, repeat: limits.measure_gpu(device),
    "launches": launches,
    "cell": cell,
}

if __name__ == "__main__":
    Path(sys.argv[3]).write_text(json.dumps(here(sys.argv[1], json.loads(sys.argv[2]))), encoding="utf-8")
