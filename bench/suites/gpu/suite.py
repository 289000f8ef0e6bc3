"""`python -m bench gpu`: the GPU's tests, and then its engines against everything they should beat, in minutes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import click
import torch

from tarflow_fast.backend.cuda.engine import cuda_missing
from tarflow_fast.devices import device_missing

from ...common import limits, options
from ...common.harness import Clock, Rounds, failed_check, in_a_line, measure_cell, unmeasured
from ...common.ml_tarflow import MlTarflow
from ...common.record import Cell, Limits, values
from ...common.suite import Suite
from . import cases, checks, report
from .cases import BASELINE, COMPILED, CUDA, DTYPE, Case, Inputs, densities, exact_images, samplers

T = TypeVar("T")
TESTS_SHARE = 0.4  # of the budget, after which the tests are stopped
SANITIZER_SHARE = 0.1  # the same for each run of the sanitizer, which are at once
INSIDE_SHARE = 0.25  # of the time for a sampling cell, for the inside of each engine
COMPILE_SHARE = 0.5  # of what is left of the budget, which compiling may take
BASELINE_SHARE = 0.25  # of the time for a cell: a baseline that takes longer than this is not run again
SLACK = {BASELINE: 2.0}  # under autocast it rounds exp(xa) too: its error is up to 2.7 times the torch backend's
DENSITY_TOLERANCE = 0.01  # of the loss and of the gradient's norm, relative to the exact ones
BUDGET = "Time for the whole run: what has not begun by then is listed as not run."
CELL = "What to measure, in this order; may be given more than once."
DRY = "Tiny sizes, on the CPU, in Triton's interpreter: tries the suite itself."


class Budget:
    """Seconds for a whole run, and how long what has been done so far took, by name."""

    def __init__(self, seconds: float, clock: Clock = time.monotonic):
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


class GpuSuite(Suite[Case]):
    """The Triton and CUDA engines on a GPU: their tests, then their speed, in under ten minutes.

    First pytest over the tests of kernels and engines, and a small run of the CUDA engine by itself and, where there is
    one, under compute-sanitizer (memcheck, racecheck), whose findings are a failure. Then cells, each one flow block of
    a model whose other seven are alike: bf16, random weights of a trained model's scale, the same noise for all.
    Sampling: ml-tarflow's reverse under bf16 autocast, the torch backend eager and (in the first cell of a model)
    compiled into CUDA graphs, the Triton engine, and the CUDA engine where it was built. Density: the loss, and the
    loss with its gradient, of ml-tarflow's model and of ours.

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
    baseline = BASELINE
    options = (
        options.CHECKOUT,
        options.option(
            "--cell",
            "cases",
            multiple=True,
            default=cases.CASES,
            show_default="all below",
            callback=_cases,
            metavar="MODEL:BATCH:PASS",
            help=CELL,
        ),
        options.option("--skip-tests", is_flag=True, help="Run neither the GPU's tests nor the sanitizer first."),
        options.option("--dry", is_flag=True, help=DRY),
        *options.of_every_suite("gpu", 540.0, BUDGET),
    )

    def prepare(self) -> None:
        chosen = self.chosen
        self.device = _device(chosen.dry)
        self.ml_tarflow, self.budget = MlTarflow.load(chosen.checkout), Budget(chosen.budget)
        self.without_cuda = cuda_missing(self.device, DTYPE)  # why the CUDA engine does not take part
        self.tests = self.sanitizer = None
        if not chosen.skip_tests:
            self.tests = checks.run_tests(TESTS_SHARE * chosen.budget)
        if not (chosen.dry or chosen.skip_tests) and self.without_cuda is None:
            self.sanitizer = checks.run_sanitizer(SANITIZER_SHARE * chosen.budget)
            # A kernel that hangs or writes where it should not would cost the whole run: what a process of its own did
            # not survive is not tried here.
            if any(run["name"] == checks.PLAIN and run["outcome"] != "ok" for run in self.sanitizer["runs"]):
                self.without_cuda = "a small run of it went wrong, see the sanitizer's"
        self.compiled: set[str] = set()  # models that the compiled torch backend has been measured on
        self.noted: list[str] = []  # the record's "failures"
        self.left = len(chosen.cases)  # cases

    def settings(self) -> dict[str, Any]:
        found = {"device": self.device.type, "dry": self.chosen.dry, "dtype": str(DTYPE).removeprefix("torch.")}
        return {**found, "backend": cases.BACKEND, "solver": "sequential"}

    def parts(self) -> dict[str, Any]:
        """Returns the checks before, empty launches, and the candidates that take no part at all. Sampling cells have
        "engine" (`inside.measure_engine`) and "cuda" (`inside.measure_cuda`) or None."""
        from . import inside  # it needs Triton: see `_device`

        rounds = Rounds(self.chosen.repeat, 1.0, self.device)
        launches = self.guard("empty launches", lambda: inside.measure_launches(rounds)) or []
        left_out = [] if self.without_cuda is None else [{"name": CUDA, "reason": self.without_cuda}]
        found = {"tests": self.tests, "sanitizer": self.sanitizer, "left_out": left_out}
        return {**found, "failures": self.noted, "launches": launches}

    def cases(self) -> list[Case]:
        return [case.made_dry() if self.chosen.dry else case for case in self.chosen.cases]

    def limits(self) -> Limits:
        return limits.measure_gpu(self.device)

    def skip(self, case: Case) -> str | None:
        self.left -= 1
        return None if self.budget.allows(case.kind) else "budget"

    def guard(self, what: str, run: Callable[[], T]) -> T | None:
        """Returns what `run` returns. A failure is noted instead: it must not cost the rest of the run, whose minutes
        on a GPU are dear."""
        try:
            return run()
        except Exception as error:
            self.noted.append(f"{what}: {in_a_line(error)}")
            return None

    @property
    def rounds(self) -> Rounds:
        """For one case: an equal part of what is left."""
        seconds = max(0.0, self.budget.left()) / (self.left + 1)
        return Rounds(self.chosen.repeat, seconds, self.device)

    def measure(self, case: Case) -> Cell:
        started = time.monotonic()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the next case has other sizes
        what = self._density if case.kind == "density" else self._sampling
        cell = unmeasured(case, failed_check("see the failures below"))
        cell = self.guard(values(cell, " "), lambda: what(case, Inputs.of(case, self.device, self.chosen.seed))) or cell
        compiling = sum(run["first_seconds"] for run in cell["runs"] if run["name"] == COMPILED)
        self.budget.note(COMPILED, compiling)
        self.budget.note(case.kind, time.monotonic() - started - compiling)
        return cell

    def _cell(self, case: Case, candidates: Any, rounds: Rounds, **how: Any) -> Any:
        return measure_cell(case, candidates, rounds, all_or_none=False, baseline_share=BASELINE_SHARE, **how)

    def _sampling(self, case: Case, inputs: Inputs) -> Any:
        from . import inside

        assert self.ml_tarflow is not None
        exact, why = exact_images(case, inputs, self.device), None
        if case.config in self.compiled:
            why = "not run: only in a model's first"
        elif not self.budget.allows(COMPILED, COMPILE_SHARE):
            why = "not run: budget"
        self.compiled.add(case.config)
        part = {"compiled": why is None, "cuda": self.without_cuda is None}
        candidates = samplers(case, inputs, self.ml_tarflow, self.device, **part)
        how: dict[str, Any] = {"exact": exact, "yardstick": (cases.TORCH, DTYPE), "slack": SLACK}
        cell = self._cell(case, candidates, self.rounds.share(1 - 2 * INSIDE_SHARE), **how)
        if why is not None:
            cell["left_out"].append({"name": COMPILED, "reason": why})
        of = (case, inputs, exact, cell["check"]["tolerance"], self.rounds.share(INSIDE_SHARE))
        cell["engine"] = self.guard("kernels", lambda: inside.measure_engine(*of))
        if part["cuda"]:
            cell["cuda"] = self.guard("CUDA engine", lambda: inside.measure_cuda(*of))
        return cell

    def _density(self, case: Case, inputs: Inputs) -> Any:
        """Returns the cell of a density case, whose results are taken in units of the exact ones."""
        assert self.ml_tarflow is not None
        exact, candidates = densities(case, inputs, self.ml_tarflow, self.device)
        how: dict[str, Any] = {"view": lambda result: result / exact, "tolerance": DENSITY_TOLERANCE}
        return self._cell(case, candidates, self.rounds, exact=torch.ones_like(exact), **how)

    def lines(self, record: Any) -> list[str]:
        return report.lines(record)

    def failures(self, record: Any) -> list[str]:
        return [*super().failures(record), *report.failures(record)]


SUITE = GpuSuite()
