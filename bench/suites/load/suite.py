"""`python -m bench load`: how much longer everything takes beside busy processes, and what would be fair."""

from __future__ import annotations

import functools
import itertools
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import click
from torch import Tensor

from tarflow_fast.devices import torch_threads

from ...common import harness, options, plot
from ...common.harness import Case, Rounds
from ...common.machine import CPU, cores
from ...common.record import counted
from ...common.suite import Suite
from ...common.table import labelled
from .busy import busy_processes, fair_slowdown
from .tasks import TASKS, Tasks

SAMPLE = 0.2  # seconds that a sample takes at least on a quiet machine: many turns of the scheduler
COLUMNS = (
    "quiet: {quiet} | busy: {median:.4g} | n: {n} | slowdown: {slowdown[median]:.2f} | "
    "p20-p80: {slowdown[p20]:.2f}-{slowdown[p80]:.2f} | fair: {fair:.2f} | / fair: {over_fair:.2f} | max error: {error}"
)


def beside(count: int, calls: int, task: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Returns the seconds of one of so many calls beside busy processes, whose start is no part of it, and a result."""
    found: list[Tensor] = []
    with busy_processes(count):
        return harness.wall(lambda: found.extend(task() for _ in range(calls))) / calls, found[0]


def measure(case: Case, task: Callable[[], Tensor], tolerance: float, busy: int, available: int, rounds: Rounds) -> Any:
    """Returns a cell. available: cores. fair: `fair_slowdown`. The busy run has a "slowdown" beside its ratio: busy /
    quiet, round by round."""

    def told(run: Callable[[], Any]) -> float:
        return float(run()[0])

    task()
    calls = math.ceil(SAMPLE / harness.wall(task))
    candidates = {name: functools.partial(beside, n, calls, task) for name, n in (("quiet", 0), ("busy", busy))}
    how: dict[str, Any] = {"tolerance": tolerance, "view": itemgetter(1)}
    cell = harness.measure_cell(case, harness.ready(candidates), replace(rounds, timer=told), **how)
    for run in cell["runs"][1:]:
        run["slowdown"] = harness.ratio(run["seconds"], cell["runs"][0]["seconds"])
    return {**cell, "fair": fair_slowdown(case.label["threads"], busy, available)}


def _row(cell: Any) -> dict[str, Any]:
    runs, row = {run["name"]: run for run in cell["runs"]}, {"fair": cell["fair"], **cell["check"]}
    if not runs:
        return {**row, "quiet": "FAILED"}
    busy, quiet = runs["busy"], f"{runs['quiet']['median']:.4g}"
    return {**row, **busy, "quiet": quiet, "over_fair": busy["slowdown"]["median"] / cell["fair"]}


def _machine(settings: dict[str, Any]) -> str:
    return f"{counted(settings['busy'], 'busy process', 'es')} on {counted(settings['cores'], 'core')}"


class Load(Suite):
    """Sampling, denoising, densities and whole commands, on a quiet machine and beside busy processes.

    Each task runs quiet and busy in turns, on 1 to as many threads as there are cores. Busy processes are loops of one
    thread that never wait; they are there only while a busy sample is taken. Results must be the same quiet and busy; a
    cell that fails is not timed, and the exit code is 1. With t threads, n busy processes and c cores a fair scheduler
    lets a task take max(1, (t + n)/c) times as long as on a quiet machine.

    \b
    Tasks:
      sample               Sampler.sample, engine cpu, sequential, without denoising
      denoise              tarflow_fast.denoise of these images
      log_prob             TarFlow.log_prob of these images
      bits_per_dim         tarflow_fast.bits_per_dim of these images in 8 bits
      tarflow-fast sample  the command, a process of its own, from its start to its end
      tarflow-fast eval    the same, on a file of these images, without the accuracy

    The tasks of the library run in this process. In the table quiet and busy are seconds of one call, and slowdown is
    busy / quiet, round by round.
    """

    name = "load"
    baseline = "quiet"
    options = (
        options.option("--model", "path", help=f"{options.MODEL_HELP}.", **options.MODEL),
        options.several("--task", "tasks", type=TASKS, default=tuple(TASKS), help="Tasks to be run"),
        options.count("--batch", "The number of images of each task.", default=80),
        options.count("--busy", "The number of busy processes.", metavar="N", show_default="as many as cores"),
        options.EVERY_THREADS,
        *options.of_every_suite("load", 120.0),
    )

    def prepare(self) -> None:
        chosen, temporary = self.chosen, tempfile.TemporaryDirectory()
        chosen.busy = chosen.busy or cores()
        self.model_name, model = options.load_model(chosen.path, CPU)
        folder = Path(click.get_current_context().with_resource(temporary))
        self.tasks = Tasks(model, chosen.path, chosen.batch, chosen.seed, folder)

    def settings(self) -> dict[str, Any]:
        policy = os.environ.get("OMP_WAIT_POLICY")
        return {"model": self.model_name, "cores": cores(), "omp_wait_policy": policy}

    def cases(self) -> list[Case]:
        pairs = itertools.product(dict.fromkeys(self.chosen.tasks), self.chosen.threads)
        return [Case({"task": name, "threads": threads}, threads=threads) for name, threads in pairs]

    def measure(self, case: Case) -> Any:
        task, tolerance = TASKS[case.label["task"]]
        with torch_threads(case.threads):
            return measure(case, functools.partial(task, self.tasks), tolerance, self.chosen.busy, cores(), self.rounds)

    def lines(self, record: Any) -> list[str]:
        settings, rows = record["settings"], [(cell, _row(cell)) for cell in record["cells"]]
        waiting = f"OMP_WAIT_POLICY {settings['omp_wait_policy'] or 'not set'}"
        return [
            f"model:   {settings['model']}, batch {settings['batch']}, {settings['dtype']}; {waiting}",
            f"load:    {_machine(settings)}; load average before that {record['machine']['load_average']}",
            "",
            *labelled(COLUMNS, rows),
            *self.failed(record),
        ]

    def figure(self, record: Any) -> plot.Figure:
        """Returns bars of the slowdown for each task and number of threads, with a share that is 100 % where it is
        fair."""
        for cell in record["cells"]:
            for run in cell["runs"]:
                run |= {"fraction_of_limit": cell["fair"] / run["slowdown"]["median"]} if "slowdown" in run else {}
        ylabel = f"times as long beside {_machine(record['settings'])}"
        return plot.bars(record, ("task",), ("threads",), ylabel, "slowdown")


SUITE = Load()
