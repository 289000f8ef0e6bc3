"""`python -m bench load`: how much longer everything takes beside busy processes, and what would be fair."""

from __future__ import annotations

import itertools
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from tarflow_fast.devices import torch_threads

from ...common import harness, options, plot
from ...common.harness import Case, Rounds
from ...common.machine import CPU, cores
from ...common.models import DENSITIES
from ...common.record import counted, hardware
from ...common.suite import Suite
from ...common.table import table
from .busy import busy_processes, fair_slowdown, spin, spin_rate
from .tasks import TASKS, Run, Tasks

TARGET = 1.5  # times the fair share, at most
SAMPLE = 0.2  # seconds that a sample takes at least on a quiet machine: many turns of the scheduler
DENSITY_HELP = "Backend of denoising and densities that the library is called with; the commands choose their own."
COLUMNS = (
    "task: {task} | threads: {threads} | quiet: {quiet} | busy: {busy[median]:.4g} | n: {n} | "
    "slowdown: {slowdown[median]:.2f} | p20-p80: {slowdown[p20]:.2f}-{slowdown[p80]:.2f} | fair: {share:.2f} | "
    "spin: {spin[median]:.2f} | / fair: {over_fair:.2f} | / spin: {over_spin[median]:.2f} | max error: {error}"
)
LEGEND = """\
quiet, busy: seconds of one call, medians. slowdown: busy / quiet, round by round. fair: max(1, (t + n)/c) of t threads
beside n busy processes on c cores. spin: slowdown of as many threads that never wait for each other, measured in the
same rounds. / fair, / spin: slowdown over these two. max error: between quiet and busy results."""
SHOWN = (  # runs, what they are called in the picture, how they are drawn, and how far beside their number of threads
    ("spin busy", "threads that never wait", {"color": "#2f9457", "marker": "^"}, 0.06),
    ("busy", "the task", {"color": "#1f6fb4", "marker": "o"}, -0.06),
)


def load_runs(samples: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Returns the "runs" of a cell, from seconds of one call by "quiet", "busy", "spin quiet", "spin busy". The busy
    ones have a "slowdown" in place of a "ratio": busy / quiet, round by round."""
    runs = [harness.timed(name, seconds) for name, seconds in samples.items()]
    for run in runs:
        if run["name"].endswith("busy"):
            run["slowdown"] = harness.ratio(run["seconds"], samples[run["name"].replace("busy", "quiet")])
    return runs


def _beside(count: int, task: Callable[[], Any]) -> tuple[float, Any]:
    """Returns the seconds of a task beside so many busy processes, whose start is no part of it, and its result."""
    found: list[Any] = []
    with busy_processes(count):
        return harness.wall(lambda: found.append(task())), found[0]


def own_time(run: Callable[[], Any]) -> float:
    """Returns the seconds that `run` says itself."""
    return float(run()[0])


def measure(run: Run, threads: int, tolerance: float, busy: int, available: int, rate: float, rounds: Rounds) -> Any:
    """Returns a cell without its label. available: cores. rate: see `spin_rate`. rounds: timed by `own_time`.

    fair: `fair_slowdown`; over_fair: the median slowdown over that; over_spin: its spread over the yardstick's, by
    round. The yardstick is given as much to do as takes it, alone, as long as the task: both meet the same scheduler.
    """
    compared = {"quiet": lambda: run, "busy": lambda: lambda: _beside(busy, run)[1]}
    _, check = harness.admit_all(compared, tolerance=tolerance)
    cell: dict[str, Any] = {"check": check, "fair": fair_slowdown(threads, busy, available), "runs": []}
    if not check["passed"]:
        return cell
    once = harness.wall(run)
    calls = math.ceil(SAMPLE / once)
    tasks: dict[str, Callable[[], Any]] = {
        "": lambda: [run() for _ in range(calls)],
        "spin ": lambda: spin(threads, math.ceil(rate * calls * once)),
    }
    turns = {
        f"{name}{state}": lambda task=task, count=count: _beside(count, task)
        for state, count in (("quiet", 0), ("busy", busy))
        for name, task in tasks.items()
    }
    samples = rounds.alternate(turns)
    cell["runs"] = load_runs({name: [each / calls for each in seconds] for name, seconds in samples.items()})
    slowdown, spun = (run["slowdown"] for run in cell["runs"] if "slowdown" in run)
    cell["over_fair"] = slowdown["median"] / cell["fair"]
    cell["over_spin"] = harness.spread(harness.ratio(slowdown["samples"], spun["samples"])["samples"])
    return cell


def _row(cell: Any) -> dict[str, Any]:
    row = {**cell, **cell["label"], "max_error": cell["check"]["max_error"], "quiet": "FAILED"}
    if not cell["runs"]:
        return row
    quiet, _, busy, spun = cell["runs"]
    row |= {"quiet": f"{quiet['median']:.4g}", "busy": busy, "n": len(busy["seconds"]), "share": cell["fair"]}
    return row | {"slowdown": busy["slowdown"], "spin": spun["slowdown"]}


def _machine(settings: dict[str, Any]) -> str:
    return f"{counted(settings['busy'], 'busy process', 'es')} on {counted(settings['cores'], 'core')}"


class Load(Suite):
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
        options.count("--busy", "The number of busy processes.", metavar="N", show_default="as many as cores"),
        options.EVERY_THREADS,
        *options.of_every_suite("load", 120.0),
    )

    def prepare(self) -> None:
        chosen, temporary = self.chosen, tempfile.TemporaryDirectory()
        chosen.busy = chosen.busy or cores()
        self.model_name, model = options.load_model(chosen.path, CPU)
        folder = Path(click.get_current_context().with_resource(temporary))
        self.tasks = Tasks(model, chosen.path, chosen.batch, chosen.seed, chosen.density, folder)
        self.rate = spin_rate()

    def settings(self) -> dict[str, Any]:
        found = {"model": self.model_name, "cores": cores(), "target": TARGET}
        return {**found, "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY")}

    def cases(self) -> list[Case]:
        pairs = itertools.product(dict.fromkeys(self.chosen.tasks), self.chosen.threads)
        return [Case({"task": name, "threads": threads}, threads=threads) for name, threads in pairs]

    def measure(self, case: Case) -> Any:
        (make, tolerance), threads = TASKS[case.label["task"]], case.label["threads"]
        rounds = Rounds(self.chosen.repeat, self.chosen.budget_seconds, timer=own_time)
        with torch_threads(case.threads):
            how = (threads, tolerance, self.chosen.busy, cores(), self.rate, rounds)
            return {"label": case.label, **measure(make(self.tasks, threads), *how)}

    def called(self, cell: Any) -> str:
        return f"{cell['label']['task']} on {counted(cell['label']['threads'], 'thread')}"

    def lines(self, record: Any) -> list[str]:
        settings, cells = record["settings"], record["cells"]
        over = [(cell, cell["over_fair"]) for cell in cells if cell["runs"]]
        missed = ", ".join(f"{self.called(cell)} ({times:.2f})" for cell, times in over if times > settings["target"])
        return [
            f"model:   {settings['model']}, batch {settings['batch']}, {settings['dtype']}, "
            f"density {settings['density']}; OMP_WAIT_POLICY {settings['omp_wait_policy'] or 'not set'}",
            f"load:    {_machine(settings)}; load average before that {record['machine']['load_average']}",
            "",
            *table(COLUMNS, map(_row, cells)),
            "",
            *LEGEND.splitlines(),
            f"target: at most {settings['target']:g} times the fair share, "
            f"{f'missed by {missed}' if missed else 'met by all that was timed'}",
            *self.failed(record),
        ]

    def figure(self, record: Any) -> plot.Figure:
        """Returns a panel for each task: the slowdown by number of threads, with lines from p20 to p80."""
        settings, panels = record["settings"], []
        target = settings["target"]
        for task in dict.fromkeys(cell["label"]["task"] for cell in record["cells"]):
            cells = {cell["label"]["threads"]: cell for cell in record["cells"] if cell["label"]["task"] == task}
            fair, grey = [cell["fair"] for cell in cells.values()], {"color": plot.GREY, "marker": "_"}
            allowed, red = [target * each for each in fair], {"color": plot.RED, "marker": "_", "linestyle": "--"}
            series = [plot.Series("fair share", list(cells), fair, grey)]
            series += [plot.Series(f"target, {target:g} times that", list(cells), allowed, red)]
            for name, called, style, beside in SHOWN:
                runs = [(t + beside, run) for t, cell in cells.items() for run in cell["runs"] if run["name"] == name]
                series += [plot.Series(called, [t for t, _ in runs], [run["slowdown"] for _, run in runs], style)]
            axes = {"xlim": (min(cells) - 0.5, max(cells) + 0.5), "ylim": (0, None), "xticks": list(cells)}
            failed = [(threads, 0.0) for threads, cell in cells.items() if not cell["runs"]]
            panels.append(plot.Panel(task, series=series, failed=failed, axes=axes))
        how = f"batch {settings['batch']}; torch {record['machine']['torch']}; median, line from p20 to p80"
        below = f"threads\n{hardware(record)}; {_machine(settings)}; {how}"
        ylabel = "times as long as on the quiet machine"
        return plot.draw(panels, 3, (3.4, 3.0), below, legend_columns=2, ylabel=ylabel)


SUITE = Load()
