"""`python -m bench load`: how much longer everything takes beside busy processes, and what would be fair."""

from __future__ import annotations

import functools
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from tarflow_fast.devices import torch_threads

from ...common import harness, options, plot
from ...common.harness import Rounds
from ...common.machine import CPU, cores
from ...common.models import DENSITIES
from ...common.record import Cell, counted, hardware
from ...common.suite import Suite
from ...common.table import table
from .busy import busy_processes, fair_slowdown, spin, spin_rate
from .tasks import TASKS, Inputs, Run

TARGET = 1.5  # times the fair share, at most
SAMPLE = 0.2  # seconds that a sample takes at least on a quiet machine: many turns of the scheduler
DENSITY_HELP = "Backend of denoising and densities that the library is called with; the commands choose their own."
BUSY_HELP = "The number of busy processes."
COLUMNS = (
    "task: {task} | threads: {threads} | quiet: {quiet} | busy: {busy[median]:.4g} | n: {n} | "
    "slowdown: {slowdown[median]:.2f} | p20-p80: {slowdown[p20]:.2f}-{slowdown[p80]:.2f} | fair: {share:.2f} | "
    "spin: {spin[median]:.2f} | / fair: {over_fair:.2f} | / spin: {over_spin[median]:.2f} | max error: {error}"
)
LEGEND = """\
quiet, busy: seconds of one call, medians. slowdown: busy / quiet, round by round. fair: max(1, (t + n)/c) of t threads
beside n busy processes on c cores. spin: slowdown of as many threads that never wait for each other, measured in the
same rounds. / fair, / spin: slowdown over these two. max error: between quiet and busy results."""
MARKS = (  # a run, how far beside its number of threads it is drawn, and how
    ("spin busy", 0.06, "#2f9457", "^", "threads that never wait"),
    ("busy", -0.06, "#1f6fb4", "o", "the task"),
)


@dataclass(frozen=True)
class Case:
    """A task on so many threads."""

    task: str
    threads: int

    @property
    def label(self) -> dict[str, Any]:
        return dict(vars(self))


def load_runs(samples: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Returns the "runs" of a cell, from seconds of one call by "quiet", "busy", "spin quiet", "spin busy". The busy
    ones have a "slowdown" in place of a "ratio": busy / quiet, round by round."""
    runs = [harness.timed(name, seconds) for name, seconds in samples.items()]
    for run in runs:
        if run["name"].endswith("busy"):
            run["slowdown"] = harness.ratio(run["seconds"], samples[run["name"].replace("busy", "quiet")])
    return runs


def measure(run: Run, threads: int, tolerance: float, busy: int, available: int, rate: float, rounds: Rounds) -> Any:
    """Returns a cell without its label. available: cores. rate: see `spin_rate`. rounds: timed by `own_time`, as
    starting the processes is no part of a task.

    fair: `busy.fair_slowdown`; over_fair: the median slowdown over that; over_spin: its spread over the yardstick's,
    round by round. The yardstick is given as much to do as takes it, alone, as long as the task, so that both meet the
    same turns of the scheduler.
    """

    def beside(count: int, task: Callable[[], Any]) -> float:
        """Returns the seconds of a task beside so many busy processes."""
        with busy_processes(count):
            return harness.wall(task)

    def loaded() -> Any:
        with busy_processes(busy):
            return run()

    def repeated() -> None:
        for _ in range(calls):
            run()

    _, check = harness.admit_all({"quiet": lambda: run, "busy": lambda: loaded}, tolerance=tolerance)
    cell: dict[str, Any] = {"check": check, "fair": fair_slowdown(threads, busy, available), "runs": []}
    if not check["passed"]:
        return cell
    once = harness.wall(run)
    calls = math.ceil(SAMPLE / once)
    yardstick = functools.partial(spin, threads, math.ceil(rate * calls * once))
    samples = rounds.alternate(
        {
            f"{name}{state}": functools.partial(beside, count, task)
            for state, count in (("quiet", 0), ("busy", busy))
            for name, task in (("", repeated), ("spin ", yardstick))
        }
    )
    cell["runs"] = load_runs({name: [each / calls for each in seconds] for name, seconds in samples.items()})
    slowdown, spun = (run["slowdown"] for run in cell["runs"] if "slowdown" in run)
    cell["over_fair"] = slowdown["median"] / cell["fair"]
    cell["over_spin"] = harness.spread(harness.ratio(slowdown["samples"], spun["samples"])["samples"])
    return cell


def own_time(run: Callable[[], Any]) -> float:
    """Returns the seconds that `run` says itself."""
    return float(run())


def _row(cell: Any) -> dict[str, Any]:
    row = {**cell, **cell["label"], "max_error": cell["check"]["max_error"], "quiet": "FAILED"}
    if not cell["runs"]:
        return row
    quiet, _, busy, spun = cell["runs"]
    row |= {"quiet": f"{quiet['median']:.4g}", "busy": busy, "n": len(busy["seconds"]), "share": cell["fair"]}
    return row | {"slowdown": busy["slowdown"], "spin": spun["slowdown"]}


def _machine(settings: dict[str, Any]) -> str:
    return f"{counted(settings['busy'], 'busy process', 'es')} on {counted(settings['cores'], 'core')}"


class Load(Suite[Case]):
    """Sampling, denoising, densities and whole commands, on a quiet machine and beside busy processes.

    Each task runs quiet and busy in turns, in one run, on 1 to as many threads as there are cores. Busy processes are
    loops of one thread that never wait; they are there only while a busy sample is taken. First the results must be
    the same quiet and busy; a cell that fails is not timed, and the exit code is 1.

    With t threads, n busy processes and c cores a fair scheduler lets a task take max(1, (t + n)/c) times as long as
    on a quiet machine: t + n threads share c cores evenly. That holds for threads that never wait for each other, so
    such ones are measured too, in the same rounds and for as long: "spin", which is what this machine's scheduler
    can do. The target is at most 1.5 times the fair share.

    \b
    Tasks:
      sample               Sampler.sample, engine cpu, sequential, without denoising
      denoise              tarflow_fast.denoise of these images
      log_prob             TarFlow.log_prob of these images
      bits_per_dim         tarflow_fast.bits_per_dim of these images in 8 bits
      tarflow-fast sample  the command, a process of its own, from its start to its end
      tarflow-fast eval    the same, on a file of these images, without the accuracy

    The tasks of the library run in this process, whose OMP_WAIT_POLICY is that of the environment.
    """

    name = "load"
    baseline = "quiet"
    options = (
        options.option("--model", "path", help=f"{options.MODEL_HELP}.", **options.MODEL),
        options.several("--task", "tasks", type=TASKS, default=tuple(TASKS), help="Tasks to be run"),
        options.count("--batch", "The number of images of each task.", default=80),
        options.option("--density", type=click.Choice(DENSITIES), default="auto", help=DENSITY_HELP),
        options.count("--busy", BUSY_HELP, metavar="N", show_default="as many as there are cores"),
        options.EVERY_THREADS,
        *options.of_every_suite("load", 120.0),
    )

    def prepare(self) -> None:
        chosen, temporary = self.chosen, tempfile.TemporaryDirectory()
        chosen.busy = chosen.busy or cores()
        self.model_name, model = options.load_model(chosen.path, CPU)
        folder = Path(click.get_current_context().with_resource(temporary))
        self.inputs = Inputs.draw(model, chosen.path, chosen.batch, chosen.seed, chosen.density, folder)
        self.rate = spin_rate()

    def settings(self) -> dict[str, Any]:
        chosen = self.chosen
        found: dict[str, Any] = {"model": self.model_name, "device": "cpu", "dtype": "float32"}
        found |= {"density": chosen.density, "batch": chosen.batch, "busy": chosen.busy, "cores": cores()}
        return {**found, "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"), "target": TARGET}

    def cases(self) -> list[Case]:
        return [Case(name, count) for name in dict.fromkeys(self.chosen.tasks) for count in self.chosen.threads]

    def measure(self, case: Case) -> Any:
        task, rounds = TASKS[case.task], Rounds(self.chosen.repeat, self.chosen.budget, timer=own_time)
        with torch_threads(case.threads):
            run = task.make(self.inputs, case.threads)
            how = (task.tolerance, self.chosen.busy, cores(), self.rate)
            return {"label": case.label, **measure(run, case.threads, *how, rounds)}

    def called(self, cell: Cell) -> str:
        return f"{cell['label']['task']} on {counted(cell['label']['threads'], 'thread')}"

    def lines(self, record: Any) -> list[str]:
        settings, cells = record["settings"], record["cells"]
        over = [(cell, cell["over_fair"]) for cell in cells if cell["runs"]]
        missed = ", ".join(f"{self.called(cell)} ({times:.2f})" for cell, times in over if times > settings["target"])
        verdict = f"missed by {missed}" if missed else "met by all that was timed"
        return [
            f"model:   {settings['model']}, batch {settings['batch']}, {settings['dtype']}, "
            f"density {settings['density']}; OMP_WAIT_POLICY {settings['omp_wait_policy'] or 'not set'}",
            f"load:    {_machine(settings)}; load average before that {record['machine']['load_average']}",
            "",
            *table(COLUMNS, map(_row, cells)),
            "",
            *LEGEND.splitlines(),
            f"target: at most {settings['target']:g} times the fair share, {verdict}",
            *self.failed(record),
        ]

    def figure(self, record: Any) -> plot.Figure:
        """Returns a panel for each task: the slowdown by number of threads, with lines from p20 to p80."""
        settings, target = record["settings"], record["settings"]["target"]
        tasks = list(dict.fromkeys(cell["label"]["task"] for cell in record["cells"]))
        figure, panels = plot.grid(len(tasks), 3, (3.4, 3.0), (0.8, 1.3))
        handles: dict[str, Any] = {}
        for axes, task in zip(panels, tasks, strict=True):
            cells = [cell for cell in record["cells"] if cell["label"]["task"] == task]
            counts, fair = [cell["label"]["threads"] for cell in cells], [cell["fair"] for cell in cells]
            allowed = [target * each for each in fair]
            (handles["fair share"],) = axes.plot(counts, fair, "-_", color=plot.GREY, zorder=1)
            (handles[f"target, {target:g} times that"],) = axes.plot(
                counts, allowed, "--_", color=plot.RED, linewidth=1, zorder=1
            )
            for name, offset, colour, marker, label in MARKS:
                for threads, cell in zip(counts, cells, strict=True):
                    for run in (run for run in cell["runs"] if run["name"] == name):
                        handles[label] = plot.point(axes, threads + offset, run["slowdown"], colour, marker)
            for threads, cell in zip(counts, cells, strict=True):
                if not cell["runs"]:
                    plot.say_failed(axes, threads)
            axes.set_title(task, fontsize=11)
            axes.set_xlim(min(counts) - 0.5, max(counts) + 0.5)
            axes.set_ylim(bottom=0)
            plot.whole_numbers(axes)
        figure.supylabel("times as long as on the quiet machine", fontsize=10)
        plot.legend(figure, handles, 2)
        how = f"batch {settings['batch']}; torch {record['machine']['torch']}; median, line from p20 to p80"
        plot.footer(figure, f"threads\n{hardware(record)}; {_machine(settings)}; {how}")
        return figure


SUITE = Load()
