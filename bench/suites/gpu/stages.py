"""The stages of `bench gpu`, each of which is a process of its own: a kernel that hangs, crashes or leaves a process
without a GPU costs its own stage, and nothing else.

`python -m bench.suites.gpu.stages NAME REQUEST FILE` does a stage; the request and what it leaves in FILE are JSON.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tarflow_fast.probe.processes import run_all

from ...common import limits
from ...common.harness import Rounds, check_of, in_a_line, measure_cell, unmeasured
from ...common.machine import ROOT
from ...common.ml_tarflow import MlTarflow
from ...common.record import values
from . import cases
from .cases import BASELINE, DTYPE, Case, Inputs

# Whose tests run on a GPU where there is one.
KERNELS = ("norm_linear", "cached_attention", "affine_step", "affine_density", "fixed_point_update")
TRITON, CUDA = ("engine", "workspace", "graph", "plan"), ("engine", "same_bits", "refusals", "frontier")
FILES = (
    *("tests/engine/test_contract.py", "tests/engine/test_windows.py", "tests/backend/test_images.py"),
    "tests/backend/pytorch/test_compile.py",
    *(f"tests/kernels/test_{name}.py" for name in KERNELS),
    *(f"tests/backend/triton/test_{name}.py" for name in TRITON),
    *(f"tests/backend/cuda/test_{name}.py" for name in CUDA),
)
PYTEST = (sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist")
COMMAND = (sys.executable, "-m", "bench.suites.gpu.stages")
INSIDE_SHARE = 0.25  # of the time for a sampling cell, for the inside of each engine
BASELINE_SHARE = 0.25  # of the time for a cell: a baseline that takes longer than this is not run again
SLACK = {BASELINE: 2.0}  # under autocast it rounds exp(xa) too: its error is up to 2.7 times the torch backend's
DENSITY_TOLERANCE = 0.01  # of the loss and of the gradient's norm, relative to the exact ones


def run_tests(seconds: float) -> dict[str, Any]:
    """Returns {passed, failed, seconds, ok, tail} of pytest over FILES, a process for each file, all at once: most of
    the time kernels are being compiled. They are stopped after `seconds`, which is no success.

    failed: tests that failed or could not be set up. tail: the last lines of each file's run that went wrong, or None.
    """
    done = run_all({file: (*PYTEST, file) for file in FILES}, seconds, ROOT).values()
    counts = {"passed": 0, "failed": 0, "error": 0}
    for number, word in re.findall(r"(\d+) (passed|failed|error)", "".join(run.output for run in done)):
        counts[word] += int(number)
    # pytest ends with 5 where a file is skipped as a whole, as of an engine that was not built
    wrong = [run for run in done if run.code != 0 and not (run.code == 5 and " skipped" in run.output)]
    tail = [line for run in wrong for line in run.tail]
    found: dict[str, Any] = {"passed": counts["passed"], "failed": counts["failed"] + counts["error"]}
    return {**found, "seconds": max(run.seconds for run in done), "ok": not tail, "tail": tail or None}


def in_process(name: str, request: dict[str, Any], seconds: float) -> Any:
    """Returns what a stage leaves, which is done in a process of its own and stopped after `seconds`.

    Raises RuntimeError if it leaves nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "left.json"
        done = run_all({name: (*COMMAND, name, json.dumps(request), str(path))}, seconds, ROOT)[name]
        if done.code != 0:
            last = (done.tail or ["nothing was said"])[-1]
            raise RuntimeError(f"its process ended with {done.code}: {last}" if done.code is not None else last)
        return json.loads(path.read_text(encoding="utf-8"))


def here(name: str, request: dict[str, Any], seconds: float = 0.0) -> Any:
    """Returns what a stage leaves, which is done in this process."""
    return STAGES[name](device=torch.device("cpu" if request.pop("dry") else "cuda"), **request)


def do_limits(device: torch.device, **request: Any) -> Any:
    return limits.measure_gpu(device)


def do_launches(device: torch.device, repeat: int, **request: Any) -> Any:
    from . import inside  # it needs Triton

    return inside.measure_launches(Rounds(repeat, 1.0, device))


def do_cell(
    device: torch.device, case: dict[str, Any], repeat: int, seconds: float, seed: int, checkout: str, **part: bool
) -> Any:
    """Returns {cell, failures, seconds}: a cell, what went wrong in it, and what compiling and all else took.

    part: whether "compiled" and "cuda" take part. A failure must not cost the rest, as minutes on a GPU are dear.
    """
    started, noted, this = time.monotonic(), [], Case(**case)
    rounds, ml_tarflow = Rounds(repeat, seconds, device), MlTarflow.load(Path(checkout))

    def guard(what: str, run: Callable[[], Any]) -> Any:
        try:
            return run()
        except Exception as error:
            noted.append(f"{what}: {in_a_line(error)}")
            return None

    def measure() -> Any:
        inputs = Inputs.of(this, device, seed)
        how: dict[str, Any] = {"all_or_none": False, "baseline_share": BASELINE_SHARE}
        if this.kind == "density":  # results are taken in units of the exact ones
            exact, candidates = cases.densities(this, inputs, ml_tarflow, device)
            how |= {"view": lambda result: result / exact, "tolerance": DENSITY_TOLERANCE}
            return measure_cell(this, candidates, rounds, exact=torch.ones_like(exact), **how)
        from . import inside

        exact = cases.exact_images(this, inputs, device)
        how |= {"exact": exact, "yardstick": (cases.TORCH, DTYPE), "slack": SLACK}
        candidates = cases.samplers(this, inputs, ml_tarflow, device, **part)
        cell: Any = measure_cell(this, candidates, rounds.share(1 - 2 * INSIDE_SHARE), **how)
        of = (this, inputs, exact, cell["check"]["tolerance"], rounds.share(INSIDE_SHARE))
        cell["engine"] = guard("kernels", lambda: inside.measure_engine(*of))
        if part["cuda"]:
            cell["cuda"] = guard("CUDA engine", lambda: inside.measure_cuda(*of))
        return cell

    cell = unmeasured(this, check_of("see the failures below"))
    cell = guard(values(cell, " "), measure) or cell
    compiling = sum(run["first_seconds"] for run in cell["runs"] if run["name"] == cases.COMPILED)
    return {"cell": cell, "failures": noted, "seconds": [compiling, time.monotonic() - started - compiling]}


STAGES: dict[str, Callable[..., Any]] = {"limits": do_limits, "launches": do_launches, "cell": do_cell}


if __name__ == "__main__":
    Path(sys.argv[3]).write_text(json.dumps(here(sys.argv[1], json.loads(sys.argv[2]))), encoding="utf-8")
