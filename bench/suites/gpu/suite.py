"""`python -m bench gpu`: the GPU's tests, and then its engines against everything they should beat, in minutes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import click
import torch

from tarflow_fast.backend.cuda.engine import cuda_missing
from tarflow_fast.devices import device_missing
from tarflow_fast.probe.processes import run_all
from tarflow_fast.probe.sanitizer import PLAIN, run_sanitizer

from ...common import options
from ...common.harness import Case, check_of, in_a_line, unmeasured
from ...common.machine import ROOT
from ...common.ml_tarflow import MlTarflow
from ...common.record import Limits
from ...common.suite import Suite
from ...common.table import cells_table
from . import cells, inside
from .cells import DTYPE, GUIDANCE, case_of, text_of

TESTS_SHARE = 0.4  # of the budget, after which the tests are stopped
SANITIZER_SHARE = 0.1  # the same for each run of the sanitizer, which are at once
SETUP = 180.0  # seconds that a cell may take beside what it measures: to start, to compile, to tune
BUDGET = "Time for the whole run: what has not begun by then is listed as not run."
CELL: dict[str, Any] = {"default": cells.CASES, "show_default": "all below", "metavar": "MODEL:BATCH:PASS"}
DRY = "Tiny sizes, on the CPU, in Triton's interpreter: tries the suite itself."


def run_tests(seconds: float) -> Any:
    """Returns {name, outcome, seconds, tail} of the tests that run on a GPU, which are stopped after `seconds`."""
    command = (sys.executable, "tests/on_gpu.py", str(seconds))
    found = json.loads(run_all({"tests": command}, seconds + 60.0, ROOT)["tests"].output.splitlines()[-1])
    outcome = f"{found['passed']} passed, {found['failed']} failed"
    return {"name": "tests", "outcome": outcome, "seconds": found["seconds"], "tail": found["tail"]}


def _device(dry: bool) -> torch.device:
    """Returns where to measure. Raises click.ClickException where that cannot be had, with the mend."""
    missing = device_missing("cuda")
    if missing is not None and not dry:
        raise click.ClickException(f"there is no GPU to measure: {missing}; --dry tries the suite itself on the CPU")
    from tarflow_fast.kernels.launch import interpreting

    if dry != interpreting():
        mend = "set TRITON_INTERPRET=1, which Triton reads when it is imported" if dry else "unset TRITON_INTERPRET"
        raise click.ClickException(f"kernels run in Triton's interpreter with --dry, and only there: {mend}")
    return torch.device("cpu") if dry else torch.device("cuda", torch.cuda.current_device())


class GpuSuite(Suite):
    """The Triton and CUDA engines on a GPU: their tests, then their speed, in under ten minutes.

    First pytest over the tests of kernels and engines, and a small run of the CUDA engine by itself and, where there is
    one, under compute-sanitizer (memcheck, racecheck). Then cells, each a process of its own, of one flow block of a
    model whose other seven are alike: bf16, random weights of a trained model's scale, the same noise for all.
    Sampling: ml-tarflow's reverse under bf16 autocast, the torch backend eager and (in the first cell of a model)
    compiled into CUDA graphs, the Triton engine, and the CUDA engine where it was built. Loss: with its gradient, by
    ml-tarflow's model and by ours.

    Each candidate is checked against the same pass in fp32 before it is timed: within twice the torch backend's error
    in bf16 (ml-tarflow: four times), and half a unit of bf16; loss and gradient norm within 1 %. What fails is not
    timed, and the exit code is 1. A baseline that is too slow to be repeated is timed once. Below the cells' table:
    each kernel of the Triton engine, and an empty launch; each phase of the CUDA engine's step, and its barriers.

    \b
    Cells, by importance; PASS is guided, unguided or loss:
      afhq      256×256×3 in patches of 8, T = 1024, width 768, 8 layers, 3 classes
      imagenet  64×64×3 in patches of 2, T = 1024, width 768, 8 layers, 1000 classes
    """

    name = "gpu"
    baseline = cells.BASELINE
    groups = ("batch", "pass")
    options = (
        options.CHECKOUT,
        options.several("--cell", "cases", type=case_of, help="What to measure, in this order", **CELL),
        options.option("--skip-tests", is_flag=True, help="Run neither the GPU's tests nor the sanitizer first."),
        options.option("--dry", is_flag=True, help=DRY),
        *options.of_every_suite("gpu", 540.0, BUDGET),
    )

    def prepare(self) -> None:
        chosen, seconds = self.chosen, self.chosen.budget_seconds
        self.device, self.end = _device(chosen.dry), time.monotonic() + seconds
        self.ml_tarflow, self.reached = MlTarflow.load(chosen.checkout), Limits()
        self.without_cuda = cuda_missing(self.device, DTYPE)  # why the CUDA engine does not take part
        self.compiled: set[str] = set()  # models that the compiled torch backend has been measured on
        self.left, self.not_run = len(chosen.cases), list[str]()
        self.checks = [] if chosen.skip_tests else [run_tests(TESTS_SHARE * seconds)]
        if not (chosen.dry or chosen.skip_tests) and self.without_cuda is None:
            found = run_sanitizer(SANITIZER_SHARE * seconds)
            none = {"name": "sanitizer", "outcome": found["reason"], "seconds": 0.0, "tail": None}
            self.checks += [*found["runs"], *([none] if found["reason"] else [])]
        wrong = [each for each in self.checks if each["tail"]]
        self.noted = ["\n".join([f"{each['name']}: {each['outcome']}", *each["tail"]]) for each in wrong]
        if any(each["name"] == PLAIN for each in wrong):  # a cell does not try what a process did not survive
            self.without_cuda = "a small run of it went wrong"

    def settings(self) -> dict[str, Any]:
        found = {"dtype": str(DTYPE).removeprefix("torch."), "baseline_sha256": self.ml_tarflow.sha256}
        return {**found, "backend": cells.BACKEND, "solver": "sequential"}

    def parts(self) -> dict[str, Any]:
        """Returns the checks before, {name, outcome, seconds, tail}, why the CUDA engine takes no part, and cases for
        which there was no time. Sampling cells have "engine" and "cuda", see `inside`."""
        found = {"checks": self.checks, "without_cuda": self.without_cuda}
        return {**found, "not_run": self.not_run, "failures": self.noted}

    def cases(self) -> Iterator[Case]:
        for case in self.chosen.cases:
            self.left -= 1
            if time.monotonic() < self.end:
                yield case_of(text_of(case), self.chosen.dry)
            else:
                self.not_run.append(text_of(case))

    def limits(self, case: Case) -> Limits:
        return self.reached

    def measure(self, case: Case) -> Any:
        seconds = max(0.0, self.end - time.monotonic()) / (self.left + 1)  # an equal part of what is left
        request = {name: getattr(self.chosen, name) for name in ("dry", "repeat", "seed")}
        request |= {"case": text_of(case), "checkout": str(self.chosen.checkout)}
        request |= {"compiled": case.label["model"] not in self.compiled, "cuda": self.without_cuda is None}
        request |= {"seconds": seconds}
        self.compiled |= {case.label["model"]} if case.label["pass"] in GUIDANCE else set()
        try:
            run = cells.cell(**request) if self.chosen.dry else cells.in_process(request, SETUP + 2 * seconds)
        except Exception as error:
            return unmeasured(case, check_of(in_a_line(error)))
        self.reached = run["limits"]
        self.noted += run["failures"]
        return run["cell"]

    def lines(self, record: Any) -> list[str]:
        checks = [f"{each['name']}: {each['outcome']} in {each['seconds']:.0f} s" for each in record["checks"]]
        checks += [f"cuda, left out: {record['without_cuda']}"] if record["without_cuda"] else []
        checks += [f"not run, as there was no time: {text}" for text in record["not_run"]]
        bandwidth = max((each["bytes_per_second"] for each in record["limits"].get("copy_bandwidth", [])), default=0.0)
        within = [line for cell in record["cells"] for line in inside.lines(cell, bandwidth)]
        return [*cells_table(record), "", *checks, *(f"FAILED {each}" for each in record["failures"]), *within]


SUITE = GpuSuite()
