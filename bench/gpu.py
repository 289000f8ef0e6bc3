"""`python -m bench gpu`: the GPU's tests, and then the Triton engine against everything it should beat, in minutes."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import torch

from tarflow_fast.backend.cuda.engine import cuda_missing
from tarflow_fast.devices import device_missing

from . import cuda_sanitize, gpu_tests, limits, options
from .columns import short
from .cuda_parts import measure_cuda
from .cuda_table import CUDA
from .gpu_cells import (
    BACKEND,
    BASELINE,
    CELLS,
    COMPILED,
    DTYPE,
    TORCH,
    GpuCell,
    Inputs,
    densities,
    exact_images,
    samplers,
)
from .published import Published
from .show import require_matplotlib
from .suite import new_record, run_cells
from .timing import timer_of
from .trials import Budget, Contestant, failed_entry, in_a_line, measure_trials

T = TypeVar("T")
TESTS_SHARE = 0.4  # of the budget, after which the tests are stopped
SANITIZER_SHARE = 0.1  # the same for each run of the sanitizer, which are at once
INSIDE_SHARE = 0.25  # of the time for a sampling cell, for the inside of each engine
COMPILE_SHARE = 0.5  # of what is left of the budget, which compiling may take
SLACK = {
    BASELINE: 2.0
}  # under autocast ml-tarflow rounds exp(xa) too: its error is up to 2.7 times the torch backend's
DENSITY_TOLERANCE = 0.01  # of the loss and of the gradient's norm, relative to the exact ones


class Bench:
    """What the cells of one run have in common; `measure` is what is done for each of them."""

    def __init__(self, published: Published, device: torch.device, budget: Budget, *, repeat: int, seed: int):
        self.published, self.device, self.budget, self.repeat, self.seed = published, device, budget, repeat, seed
        self.compiled: set[str] = set()  # models that the compiled torch backend has been measured on
        self.cells_left = 0
        self.failures: list[str] = []
        self.with_cuda = False  # whether the CUDA engine takes part

    def guard(self, what: str, run: Callable[[], T]) -> T | None:
        """What `run` returns. A failure is noted instead: it must not cost the rest of the run, whose minutes on a GPU
        are dear."""
        try:
            return run()
        except Exception as error:
            self.failures.append(f"{what}: {in_a_line(error)}")
            return None

    def skip(self, cell: GpuCell) -> str | None:
        self.cells_left -= 1
        return None if self.budget.allows(cell.kind) else "budget"

    def measure(self, cell: GpuCell) -> dict[str, Any]:
        started, compiling = time.monotonic(), 0.0
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the next cell has other sizes
        what = self._density if cell.kind == "density" else self._sampling
        label = " ".join(short(value) for value in cell.label.values())
        entry = self.guard(label, lambda: what(cell)) or failed_entry(cell, "see the failures below")
        compiling = sum(run["first_seconds"] for run in entry["runs"] if run["name"] == COMPILED)
        self.budget.note(COMPILED, compiling)
        self.budget.note(cell.kind, time.monotonic() - started - compiling)
        return entry

    def _seconds(self) -> float:
        """For timing one cell: an equal part of what is left."""
        return max(0.0, self.budget.left()) / (self.cells_left + 1)

    def _sampling(self, cell: GpuCell) -> dict[str, Any]:
        from .engine_parts import measure_engine  # see gpu_command

        inputs = Inputs.of(cell, self.device, self.seed)
        exact = exact_images(cell, inputs, self.device)
        why = None
        if cell.config in self.compiled:
            why = "not run: only in a model's first"
        elif not self.budget.allows(COMPILED, COMPILE_SHARE):
            why = "not run: budget"
        self.compiled.add(cell.config)
        entry = measure_trials(
            cell,
            samplers(cell, inputs, self.published, self.device, compiled=why is None, cuda=self.with_cuda),
            exact,
            tolerance=None,
            floor=0.5 * torch.finfo(DTYPE).eps * float(exact.abs().max()),
            yardstick=TORCH,
            slack=SLACK,
            repeat=self.repeat,
            seconds=(1 - 2 * INSIDE_SHARE) * self._seconds(),
            timer=timer_of(self.device),
        )
        if why is not None:
            entry["left_out"].append({"name": COMPILED, "reason": why})
        inside: dict[str, Any] = {
            "tolerance": entry["check"]["tolerance"],
            "repeat": self.repeat,
            "seconds": INSIDE_SHARE * self._seconds(),
        }
        entry["engine"] = self.guard("kernels", lambda: measure_engine(cell, inputs, self.device, exact, **inside))
        if self.with_cuda:
            entry["cuda"] = self.guard("CUDA engine", lambda: measure_cuda(cell, inputs, self.device, exact, **inside))
        return entry

    def _density(self, cell: GpuCell) -> dict[str, Any]:
        inputs = Inputs.of(cell, self.device, self.seed)
        make_exact, contestants = densities(cell, inputs, self.published, self.device)
        exact = make_exact()()
        return measure_trials(
            cell,
            {name: functools.partial(_relative, make, exact) for name, make in contestants.items()},
            torch.ones_like(exact),
            tolerance=DENSITY_TOLERANCE,
            repeat=self.repeat,
            seconds=self._seconds(),
            timer=timer_of(self.device),
        )


def _relative(make: Contestant, exact: torch.Tensor) -> Callable[[], torch.Tensor]:
    """What the contestant makes, with its result in units of the exact one."""
    run = make()
    return lambda: run() / exact


def _cuda_left_out(device: torch.device, sanitizer: dict[str, Any] | None) -> str | None:
    """Why the CUDA engine does not take part, or None. sanitizer: of the record. A kernel that hangs or writes where it
    should not would cost the whole run: what a process of its own did not survive is not tried here."""
    runs = [] if sanitizer is None else sanitizer["runs"]
    if any(run["name"] == cuda_sanitize.PLAIN and run["outcome"] != "ok" for run in runs):
        return "a small run of it went wrong, see the sanitizer's"
    return cuda_missing(device, DTYPE)


def _cells(context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> list[GpuCell]:
    try:
        return [GpuCell.parse(text) for text in dict.fromkeys(texts)]
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _device(dry: bool) -> torch.device:
    """Where to measure. Raises click.ClickException where that cannot be had, with the mend."""
    missing = device_missing("cuda")
    if missing is not None and not dry:
        raise click.ClickException(f"there is no GPU to measure: {missing}; --dry tries the suite itself on the CPU")
    from tarflow_fast.kernels.launch import interpreting

    if dry != interpreting():
        mend = "set TRITON_INTERPRET=1, which Triton reads when it is imported" if dry else "unset TRITON_INTERPRET"
        where = "runs" if dry else "does not run"
        raise click.ClickException(f"{'--dry' if dry else 'bench gpu'} {where} kernels in Triton's interpreter: {mend}")
    return torch.device("cpu") if dry else torch.device("cuda", torch.cuda.current_device())


@click.command("gpu")
@options.checkout
@click.option(
    "--cell",
    "cells",
    multiple=True,
    default=CELLS,
    show_default=False,
    callback=_cells,
    metavar="MODEL:BATCH:PASS",
    help="What to measure, in this order; may be given more than once.  [default: all below]",
)
@click.option("--skip-tests", is_flag=True, help="Run neither the GPU's tests nor the sanitizer first.")
@click.option("--dry", is_flag=True, help="Tiny sizes, on the CPU, in Triton's interpreter: tries the suite itself.")
@options.repeat
@options.budget(540.0, "For the whole run: what has not begun by then is listed as not run.")
@options.seed
@options.out("gpu")
def gpu_command(
    checkout: Path,
    cells: list[GpuCell],
    skip_tests: bool,
    dry: bool,
    repeat: int,
    budget: float,
    seed: int,
    out: Path,
) -> None:
    """The Triton and CUDA engines on a GPU: their tests, then their speed, in under ten minutes.

    First pytest over the tests of kernels and engines, and a small run of the CUDA engine by itself and, where there is
    one, under compute-sanitizer (memcheck, racecheck), whose findings are a failure. Then cells, each one flow block of
    a model whose other seven are alike: bf16, random weights of a trained model's scale, the same noise for all.
    Sampling: ml-tarflow's reverse under bf16 autocast, the torch backend eager and (in the first cell of a model)
    compiled into CUDA graphs, the Triton engine, and the CUDA engine where it was built. Density: the loss, and the
    loss with its gradient, of ml-tarflow's model and of ours.

    Each contestant is checked against the same pass in fp32 before it is timed: within twice the torch backend's error
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
    require_matplotlib()
    device = _device(dry)
    # Triton is there on Linux only, and has to be imported after that check
    from .launches import measure_launches

    published = Published.load(checkout)
    remaining = Budget(budget)
    settings = {
        "device": device.type,
        "dry": dry,
        "dtype": str(DTYPE).removeprefix("torch."),
        "backend": BACKEND,
        "solver": "sequential",
        "repeat": repeat,
        "budget_seconds": budget,
        "seed": seed,
    }
    record = new_record("gpu", published, settings, baseline=BASELINE, device=device)
    record["tests"] = None if skip_tests else gpu_tests.run_tests(TESTS_SHARE * budget)
    record["sanitizer"] = None
    if not (dry or skip_tests) and cuda_missing(device, DTYPE) is None:
        record["sanitizer"] = cuda_sanitize.run_sanitizer(SANITIZER_SHARE * budget)
    without_cuda = _cuda_left_out(device, record["sanitizer"])
    record["left_out"] = [] if without_cuda is None else [{"name": CUDA, "reason": without_cuda}]
    cells = [cell.made_dry() for cell in cells] if dry else cells
    bench = Bench(published, device, remaining, repeat=repeat, seed=seed)
    bench.with_cuda = without_cuda is None
    record["failures"] = bench.failures
    launches = bench.guard("empty launches", lambda: measure_launches(device, repeat=repeat, seconds=1.0))
    record["launches"] = launches or []
    bench.cells_left = len(cells)
    run_cells(record, cells, measure=bench.measure, rates=lambda: limits.measure_gpu(device), out=out, skip=bench.skip)
