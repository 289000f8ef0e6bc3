"""`python -m bench gpu`: the GPU's tests, and then its engines against everything they should beat, in minutes."""

from __future__ import annotations

import time
from typing import Any

import click
import torch

from tarflow_fast.backend.cuda.engine import cuda_missing
from tarflow_fast.devices import device_missing
from tarflow_fast.probe.sanitizer import PLAIN, run_sanitizer

from ...common import options
from ...common.harness import Case, check_of, in_a_line, unmeasured
from ...common.ml_tarflow import MlTarflow
from ...common.record import Limits
from ...common.suite import Suite
from ...common.table import cells_table
from . import cases, inside, stages
from .cases import DTYPE, GUIDANCE, case_of

TESTS_SHARE = 0.4  # of the budget, after which the tests are stopped
SANITIZER_SHARE = 0.1  # the same for each run of the sanitizer, which are at once
SETUP = 180.0  # seconds that a cell may take beside what it measures: to start, to compile, to tune
BUDGET = "Time for the whole run: what has not begun by then is listed as not run."
CELL = "What to measure, in this order; may be given more than once."
ALL: dict[str, Any] = {"default": cases.CASES, "show_default": "all below", "metavar": "MODEL:BATCH:PASS"}
DRY = "Tiny sizes, on the CPU, in Triton's interpreter: tries the suite itself."


def _cases(context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> tuple[str, ...]:
    try:
        return tuple(text for text in dict.fromkeys(texts) if case_of(text))
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


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
    one, under compute-sanitizer (memcheck, racecheck), whose findings are a failure. Then cells, each one flow block of
    a model whose other seven are alike: bf16, random weights of a trained model's scale, the same noise for all.
    Sampling: ml-tarflow's reverse under bf16 autocast, the torch backend eager and (in the first cell of a model)
    compiled into CUDA graphs, the Triton engine, and the CUDA engine where it was built. Density: the loss, and the
    loss with its gradient, of ml-tarflow's model and of ours. Each cell is a process of its own.

    Each candidate is checked against the same pass in fp32 before it is timed: within twice the torch backend's error
    in bf16 (ml-tarflow: four times), and half a unit of bf16; density within 1 % of loss and gradient norm. One that
    fails is not timed, and the exit code is 1. A baseline that is too slow to be repeated is timed once, n = 1.

    The limit is that of the measured matrix rate and copy bandwidth. Below the cells' table: each kernel of the Triton
    engine with its bandwidth, and an empty launch, which waits for the one before; what each phase of the CUDA engine's
    step takes, and the barriers of the grid.

    \b
    Cells, by importance; PASS is guided, unguided, forward or forward+backward:
      afhq      256×256×3 in patches of 8, T = 1024, width 768, 8 layers, 3 classes
      imagenet  64×64×3 in patches of 2, T = 1024, width 768, 8 layers, 1000 classes
    """

    name = "gpu"
    baseline = cases.BASELINE
    groups = ("batch", "pass")
    options = (
        options.CHECKOUT,
        options.option("--cell", "cases", multiple=True, callback=_cases, help=CELL, **ALL),
        options.option("--skip-tests", is_flag=True, help="Run neither the GPU's tests nor the sanitizer first."),
        options.option("--dry", is_flag=True, help=DRY),
        *options.of_every_suite("gpu", 540.0, BUDGET),
    )

    def prepare(self) -> None:
        chosen, seconds = self.chosen, self.chosen.budget_seconds
        self.device, self.end = _device(chosen.dry), time.monotonic() + seconds
        self.ml_tarflow, self.noted = MlTarflow.load(chosen.checkout), list[str]()  # the record's "failures"
        self.without_cuda = cuda_missing(self.device, DTYPE)  # why the CUDA engine does not take part
        self.tests = self.sanitizer = None
        self.compiled: set[str] = set()  # models that the compiled torch backend has been measured on
        self.reached: Limits = {}
        self.left = len(chosen.cases)
        if chosen.skip_tests:
            return
        self.tests = stages.run_tests(TESTS_SHARE * seconds)
        self.noted += [] if self.tests["ok"] else ["the tests failed:\n" + "\n".join(self.tests["tail"])]
        if chosen.dry or self.without_cuda is not None:
            return
        self.sanitizer = run_sanitizer(SANITIZER_SHARE * seconds)
        for run in self.sanitizer["runs"]:
            if run["outcome"] != "ok":
                said = f"the CUDA engine's small run, {run['name']}: {run['outcome']}\n"
                self.noted.append(said + "\n".join(run["tail"]))
                if run["name"] == PLAIN:  # what a process of its own did not survive is not tried in a cell
                    self.without_cuda = "a small run of it went wrong, see the sanitizer's"

    def settings(self) -> dict[str, Any]:
        return {"dtype": str(DTYPE).removeprefix("torch."), "backend": cases.BACKEND, "solver": "sequential"}

    def parts(self) -> dict[str, Any]:
        """Returns the checks before, and why the CUDA engine takes no part at all. Sampling cells have "engine"
        (`inside.measure_kernels`) and "cuda" (`inside.measure_phases`)."""
        checks = {"tests": self.tests, "sanitizer": self.sanitizer}
        return {**checks, "without_cuda": self.without_cuda, "failures": self.noted}

    def cases(self) -> list[Case]:
        return [case_of(text, self.chosen.dry) for text in self.chosen.cases]

    def limits(self, case: Case) -> Limits:
        return self.reached

    def skip(self, case: Case) -> str | None:
        self.left -= 1
        return None if time.monotonic() < self.end else "budget"

    def measure(self, case: Case) -> Any:
        model, what = case.label["model"], case.label["pass"]
        request = {name: getattr(self.chosen, name) for name in ("dry", "repeat", "seed")}
        request |= {"case": ":".join(map(str, case.label.values())), "checkout": str(self.chosen.checkout)}
        request |= {"compiled": model not in self.compiled, "cuda": self.without_cuda is None}
        seconds = max(0.0, self.end - time.monotonic()) / (self.left + 1)  # an equal part of what is left
        self.compiled |= {model} if what in GUIDANCE else set()
        try:
            request["seconds"] = seconds
            run = stages.cell(**request) if self.chosen.dry else stages.in_process(request, SETUP + 2 * seconds)
        except Exception as error:
            return unmeasured(case, check_of(in_a_line(error)))
        self.reached, self.noted[len(self.noted) :] = run["limits"], run["failures"]
        return run["cell"]

    def lines(self, record: Any) -> list[str]:
        tests, sanitizer = record["tests"], record["sanitizer"]
        checks = ["tests:   not run"]
        if tests is not None:
            checks = [f"tests:   {tests['passed']} passed, {tests['failed']} failed in {tests['seconds']:.0f} s"]
        if sanitizer is not None:
            runs = [f"{run['name']} {run['outcome']} in {run['seconds']:.0f} s" for run in sanitizer["runs"]]
            checks.append(f"sanitizer: {', '.join(runs + ([sanitizer['reason']] if sanitizer['reason'] else []))}")
        if record["without_cuda"] is not None:
            checks.append(f"cuda:    left out: {record['without_cuda']}")
        bandwidth = max((each["bytes_per_second"] for each in record["limits"].get("copy_bandwidth", [])), default=0.0)
        within = [line for cell in record["cells"] for line in inside.lines(cell, bandwidth)]
        return [*cells_table(record), "", *checks, *(f"FAILED {each}" for each in record["failures"]), *within]


SUITE = GpuSuite()
