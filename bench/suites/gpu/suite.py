"""`python -m bench gpu`: the GPU's tests, and then its engines against everything they should beat, in minutes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import click
import torch

from tarflow_fast.backend.cuda.engine import cuda_missing
from tarflow_fast.devices import device_missing
from tarflow_fast.probe.sanitizer import PLAIN, run_sanitizer

from ...common import options
from ...common.harness import in_a_line
from ...common.ml_tarflow import MlTarflow
from ...common.record import Limits, values
from ...common.suite import Suite
from . import cases, report, stages
from .cases import COMPILED, DTYPE, Case

TESTS_SHARE = 0.4  # of the budget, after which the tests are stopped
SANITIZER_SHARE = 0.1  # the same for each run of the sanitizer, which are at once
COMPILE_SHARE = 0.5  # of what is left of the budget, which compiling may take
SETUP = 180.0  # seconds that a stage may take beside what it measures: to start, to compile, to tune
BUDGET = "Time for the whole run: what has not begun by then is listed as not run."
CELL = "What to measure, in this order; may be given more than once."
ALL: dict[str, Any] = {"default": cases.CASES, "show_default": "all below", "metavar": "MODEL:BATCH:PASS"}
DRY = "Tiny sizes, on the CPU, in Triton's interpreter: tries the suite itself."


class Budget:
    """Seconds for a whole run, and how long what has been done so far took, by name."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self.clock, self.end = clock, clock() + seconds
        self.longest: dict[str, float] = {}

    def left(self) -> float:
        return self.end - self.clock()

    def note(self, what: str, seconds: float) -> None:
        self.longest[what] = max(seconds, self.longest.get(what, 0.0))

    def allows(self, what: str, share: float = 1.0) -> bool:
        """Tells whether the longest of its kind would fit in this share of what is left; the first needs no room."""
        return share * self.left() > self.longest.get(what, 0.0)


def _cases(context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> list[Case]:
    try:
        return [Case.parse(text) for text in dict.fromkeys(texts)]
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _device(dry: bool) -> torch.device:
    """Returns where to measure. Raises click.ClickException where that cannot be had, with the mend."""
    missing = device_missing("cuda")
    if missing is not None and not dry:
        raise click.ClickException(f"there is no GPU to measure: {missing}; --dry tries the suite itself on the CPU")
    from tarflow_fast.kernels.launch import interpreting

    if dry and not interpreting():
        mend = "set TRITON_INTERPRET=1, which Triton reads when it is imported"
        raise click.ClickException(f"--dry runs kernels in Triton's interpreter: {mend}")
    if interpreting() and not dry:
        raise click.ClickException("bench gpu does not run kernels in Triton's interpreter: unset TRITON_INTERPRET")
    return torch.device("cpu") if dry else torch.device("cuda", torch.cuda.current_device())


class GpuSuite(Suite):
    """The Triton and CUDA engines on a GPU: their tests, then their speed, in under ten minutes.

    First pytest over the tests of kernels and engines, and a small run of the CUDA engine by itself and, where there is
    one, under compute-sanitizer (memcheck, racecheck), whose findings are a failure. Then cells, each one flow block of
    a model whose other seven are alike: bf16, random weights of a trained model's scale, the same noise for all.
    Sampling: ml-tarflow's reverse under bf16 autocast, the torch backend eager and (in the first cell of a model)
    compiled into CUDA graphs, the Triton engine, and the CUDA engine where it was built. Density: the loss, and the
    loss with its gradient, of ml-tarflow's model and of ours. Each of these is a process of its own.

    Each candidate is checked against the same pass in fp32 before it is timed: within twice the torch backend's error
    in bf16 (ml-tarflow: four times), and half a unit of bf16; density within 1 % of loss and gradient norm. One that
    fails is not timed, and the exit code is 1. A baseline that is too slow to be repeated is timed once, n = 1.

    The limit is that of the measured matrix rate and copy bandwidth. Below the cells' table: an empty dependent launch;
    the CUDA engine's ratio to each of the others, and its step beside the time that memory takes for the weights and
    for all bytes of a step. Of the Triton engine the launches per token, each kernel's time and bandwidth, a step with
    and without programmatic dependent launch (PDL); of the CUDA engine what each phase of a step takes, and the
    barriers of the grid. The record is written after each cell.

    \b
    Cells, by importance; PASS is guided, unguided, forward or forward+backward:
      afhq      256×256×3 in patches of 8, T = 1024, width 768, 8 layers, 3 classes
      imagenet  64×64×3 in patches of 2, T = 1024, width 768, 8 layers, 1000 classes
    """

    name = "gpu"
    baseline = cases.BASELINE
    options = (
        options.CHECKOUT,
        options.option("--cell", "cases", multiple=True, callback=_cases, help=CELL, **ALL),
        options.option("--skip-tests", is_flag=True, help="Run neither the GPU's tests nor the sanitizer first."),
        options.option("--dry", is_flag=True, help=DRY),
        *options.of_every_suite("gpu", 540.0, BUDGET),
    )

    def prepare(self) -> None:
        chosen, seconds = self.chosen, self.chosen.budget_seconds
        self.device = _device(chosen.dry)
        self.ml_tarflow, self.budget = MlTarflow.load(chosen.checkout), Budget(seconds)
        self.without_cuda = cuda_missing(self.device, DTYPE)  # why the CUDA engine does not take part
        self.tests = None if chosen.skip_tests else stages.run_tests(TESTS_SHARE * seconds)
        self.sanitizer = None
        if not (chosen.dry or chosen.skip_tests) and self.without_cuda is None:
            self.sanitizer = run_sanitizer(SANITIZER_SHARE * seconds)
            # What a process of its own did not survive is not tried in a cell.
            if any(run["name"] == PLAIN and run["outcome"] != "ok" for run in self.sanitizer["runs"]):
                self.without_cuda = "a small run of it went wrong, see the sanitizer's"
        self.compiled: set[str] = set()  # models that the compiled torch backend has been measured on
        self.noted: list[str] = []  # the record's "failures"
        self.left = len(chosen.cases)  # cases
        self.reached: Limits = {}

    def settings(self) -> dict[str, Any]:
        return {"dtype": str(DTYPE).removeprefix("torch."), "backend": cases.BACKEND, "solver": "sequential"}

    def stage(self, what: str, name: str, limit: float = SETUP, **request: Any) -> Any:
        """Returns what a stage leaves, None if that is nothing: a failure is noted, and does not cost the rest. A dry
        run's are done in this process."""
        request |= {"dry": self.chosen.dry, "repeat": self.chosen.repeat}
        try:
            return (stages.here if self.chosen.dry else stages.in_process)(name, request, limit)
        except Exception as error:
            self.noted.append(f"{what}: {in_a_line(error)}")
            return None

    def parts(self) -> dict[str, Any]:
        """Returns the checks before, empty launches, and the candidates that take no part at all. Sampling cells have
        "engine" (`inside.measure_engine`) and "cuda" (`inside.measure_cuda`) or None."""
        left_out = [] if self.without_cuda is None else [{"name": cases.CUDA, "reason": self.without_cuda}]
        found = {"tests": self.tests, "sanitizer": self.sanitizer, "left_out": left_out, "failures": self.noted}
        return {**found, "launches": self.stage("empty launches", "launches") or []}

    def cases(self) -> list[Case]:
        return [case.made_dry() if self.chosen.dry else case for case in self.chosen.cases]

    def limits(self) -> Limits:
        self.reached = self.stage("limits", "limits") or self.reached
        if not self.reached:
            raise click.ClickException(self.noted[-1])
        return self.reached

    def skip(self, case: Case) -> str | None:
        self.left -= 1
        return None if self.budget.allows(case.kind) else "budget"

    def measure(self, case: Case) -> Any:
        why = None if self.budget.allows(COMPILED, COMPILE_SHARE) else "not run: budget"
        why = "not run: only in a model's first" if case.config in self.compiled else why
        seconds = max(0.0, self.budget.left()) / (self.left + 1)  # an equal part of what is left
        request = {"case": asdict(case), "seed": self.chosen.seed, "checkout": str(self.chosen.checkout)}
        request |= {"seconds": seconds, "compiled": why is None, "cuda": self.without_cuda is None}
        cell = stages.unknown(case)
        left = self.stage(values(cell, " "), "cell", SETUP + 2 * seconds, **request)
        if left is not None:
            cell, taken = left["cell"], dict(zip((COMPILED, case.kind), left["seconds"], strict=True))
            for name, each in taken.items():
                self.budget.note(name, each)
            self.noted += left["failures"]
        if case.kind == "sampling":
            self.compiled.add(case.config)
            cell["left_out"] += [] if why is None else [{"name": COMPILED, "reason": why}]
        return cell

    def lines(self, record: Any) -> list[str]:
        return report.lines(record)

    def failures(self, record: Any) -> list[str]:
        return [*super().failures(record), *report.failures(record)]


SUITE = GpuSuite()
