"""A cell of `bench gpu` is a process of its own: a kernel that hangs, crashes or leaves a process without a GPU costs
its own cell, and nothing else.

`python -m bench.suites.gpu.stages REQUEST FILE` measures a cell; the request and what it leaves in FILE are JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tarflow_fast.probe.processes import run_all

from ...common import harness, limits, models
from ...common.machine import ROOT
from ...common.ml_tarflow import MlTarflow
from . import cases, inside
from .cases import DTYPE, GUIDANCE

COMMAND = (sys.executable, "-m", "bench.suites.gpu.stages")
INSIDE_SHARE = 0.25  # of the time for a sampling cell, for the inside of each engine
ONCE = {cases.BASELINE: 0.25}  # of the time for a cell: a baseline that takes longer than this is not run again
SLACK = {cases.BASELINE: 2.0}  # under autocast it rounds exp(xa) too: its error is up to 2.7 times the torch backend's
DENSITY_TOLERANCE = 0.01  # of the loss and of the gradient's norm, relative to the exact ones
PATIENCE = 60.0  # seconds that the run of the tests may take longer than each of them


def run_tests(seconds: float) -> Any:
    """Returns {name, outcome, seconds, tail} of the tests that run on a GPU, which are stopped after `seconds`."""
    command = (sys.executable, "tests/on_gpu.py", str(seconds))
    found = json.loads(run_all({"tests": command}, seconds + PATIENCE, ROOT)["tests"].output.splitlines()[-1])
    outcome = f"{found['passed']} passed, {found['failed']} failed"
    return {"name": "tests", "outcome": outcome, "seconds": found["seconds"], "tail": found["tail"]}


def in_process(request: dict[str, Any], seconds: float) -> Any:
    """Returns what `cell` does, in a process stopped after `seconds`. Raises RuntimeError if there is nothing."""
    with tempfile.TemporaryDirectory() as folder:
        left = Path(folder) / "left.json"
        done = run_all({"cell": (*COMMAND, json.dumps(request), str(left))}, seconds, ROOT)["cell"]
        if done.code != 0:
            raise RuntimeError(f"its process ended with {done.code}: {' '.join(done.tail[-1:])}")
        return json.loads(left.read_text(encoding="utf-8"))


def cell(case: str, dry: bool, repeat: int, seconds: float, seed: int, checkout: str, **part: bool) -> Any:
    """Returns {cell, limits, failures}, the last what went wrong of the inside of engines.

    part: whether "compiled" and "cuda" take part. A failure must not cost the rest, as minutes on a GPU are dear.
    """
    device, this, failures = torch.device("cpu" if dry else "cuda"), cases.case_of(case, dry), list[str]()
    reached = limits.measure_gpu(device)
    rounds, theirs = harness.Rounds(repeat, seconds, device), MlTarflow.load(Path(checkout))
    model, (z, y) = models.random_model(this.sizes, seed), models.inputs(this.sizes, this.label["batch"], seed, device)
    if this.label["pass"] not in GUIDANCE:  # results are taken in units of the exact ones
        exact, candidates = cases.densities(this, model, z, y, theirs, device)
        how: dict[str, Any] = {"view": lambda result: result / exact, "tolerance": DENSITY_TOLERANCE}
        found = harness.measure_cell(this, candidates, rounds, exact=torch.ones_like(exact), once=ONCE, **how)
        return {"cell": found, "limits": reached, "failures": failures}
    inputs = (z, y, GUIDANCE[this.label["pass"]])
    how = {"exact": cases.exact_images(model, inputs, device), "yardstick": (cases.TORCH, DTYPE), "slack": SLACK}
    candidates = cases.samplers(model, inputs, theirs, device, **part)
    found = harness.measure_cell(this, candidates, rounds.share(1 - 2 * INSIDE_SHARE), once=ONCE, **how)
    parts: dict[str, tuple[str, Callable[..., Any]]] = {
        cases.TRITON: ("engine", inside.measure_kernels),
        cases.CUDA: ("cuda", inside.measure_phases),
    }
    for run in found["runs"]:
        name, measure = parts.get(run["name"], ("", None))
        try:
            found |= {name: measure(model, inputs, rounds.share(INSIDE_SHARE))} if measure else {}
        except Exception as error:
            failures.append(f"inside {run['name']}: {harness.in_a_line(error)}")
    return {"cell": found, "limits": reached, "failures": failures}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(cell(**json.loads(sys.argv[1]))), encoding="utf-8")
