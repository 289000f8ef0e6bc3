"""`python -m bench load`: how much longer everything takes beside busy processes, and what would be fair."""

from __future__ import annotations

import functools
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from tarflow_fast import load, load_pretrained

from . import options, timing
from .busy import busy_processes, cores, fair_slowdown, spin, spin_rate
from .densities import BACKENDS
from .load_tasks import TASKS, Inputs, Run
from .measure import check
from .peers import torch_threads
from .record import write
from .show import finish, require_matplotlib
from .suite import new_record

TARGET = 1.5  # times the fair share, at most
SAMPLE = 0.2  # seconds that a sample takes at least on a quiet machine: many turns of the scheduler
BASELINE = "quiet"


def beside(busy: int, run: Callable[[], object]) -> float:
    """Seconds of `run` beside so many busy processes, which start before it and end after it."""
    with busy_processes(busy):
        return timing.wall(run)


def repeated(run: Callable[[], object], calls: int) -> None:
    for _ in range(calls):
        run()


def _own_time(run: Callable[[], object]) -> float:
    """What `beside` returns: starting the processes is no part of the time."""
    seconds = run()
    assert isinstance(seconds, float)
    return seconds


def load_runs(samples: dict[str, list[float]]) -> list[dict[str, Any]]:
    """The "runs" of a cell. samples: seconds by "quiet", "busy", "spin quiet", "spin busy"."""
    runs = []
    for name, seconds in samples.items():
        run: dict[str, Any] = {"name": name, "seconds": seconds, **timing.spread(seconds)}
        if name.endswith("busy"):
            slowdowns = timing.pairwise_ratios(seconds, samples[name.replace("busy", "quiet")])
            run["slowdown"] = {"samples": slowdowns, **timing.spread(slowdowns)}
        runs.append(run)
    return runs


def measure(
    run: Run, threads: int, *, tolerance: float, busy: int, available: int, rate: float, repeat: int, budget: float
) -> dict[str, Any]:
    """A cell without its label. available: cores. rate: see `spin_rate`. repeat, budget: see `alternate`.

    The yardstick is given as much to do as takes it, alone, as long as the task, so that both meet the same turns of
    the scheduler.
    """

    def loaded() -> Any:
        with busy_processes(busy):
            return run()

    entry: dict[str, Any] = {
        "check": check({"quiet": run, "busy": loaded}, tolerance),
        "fair": fair_slowdown(threads, busy, available),
        "runs": [],
    }
    if not entry["check"]["passed"]:
        return entry
    once = timing.wall(run)
    calls = math.ceil(SAMPLE / once)
    contestants = {
        "": functools.partial(repeated, run, calls),
        "spin ": functools.partial(spin, threads, math.ceil(rate * calls * once)),
    }
    timed = {
        f"{name}{state}": functools.partial(beside, count, contestant)
        for state, count in (("quiet", 0), ("busy", busy))
        for name, contestant in contestants.items()
    }
    samples = timing.alternate(timed, repeat=repeat, budget=budget, timer=_own_time)
    entry["runs"] = load_runs({name: [each / calls for each in seconds] for name, seconds in samples.items()})
    slowdown, spun = (run["slowdown"] for run in entry["runs"] if "slowdown" in run)
    entry["over_fair"] = slowdown["median"] / entry["fair"]
    entry["over_spin"] = timing.spread(timing.pairwise_ratios(slowdown["samples"], spun["samples"]))
    return entry


@click.command("load")
@click.option(
    "--model",
    "path",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A checkpoint, .pth or .safetensors.  [default: the Fashion-MNIST model that ships with the package]",
)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    type=click.Choice(list(TASKS)),
    default=tuple(TASKS),
    help="Which tasks; may be given more than once.",
)
@click.option("--batch", type=click.IntRange(1), default=80, help="Images of each task.")
@click.option(
    "--density",
    type=click.Choice(BACKENDS),
    default="auto",
    help="Backend of denoising and densities that the library is called with; the commands choose their own.",
)
@click.option(
    "--busy", type=click.IntRange(1), metavar="N", help="Busy processes.  [default: as many as there are cores]"
)
@options.every_threads
@options.repeat
@options.budget(120.0)
@options.seed
@options.out("load")
def load_command(
    path: Path | None,
    tasks: tuple[str, ...],
    batch: int,
    density: str,
    busy: int | None,
    threads: tuple[int, ...],
    repeat: int,
    budget: float,
    seed: int,
    out: Path,
) -> None:
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
      bits_per_dim         tarflow_fast.evaluate.bits_per_dim of these images in 8 bits
      tarflow-fast sample  the command, a process of its own, from its start to its end
      tarflow-fast eval    the same, on a file of these images, without the accuracy

    The tasks of the library run in this process, whose OMP_WAIT_POLICY is that of the environment.
    """
    require_matplotlib()
    available = cores()
    busy = available if busy is None else busy
    model = load_pretrained() if path is None else load(path)
    cells = [(name, count) for name in dict.fromkeys(tasks) for count in threads]
    with tempfile.TemporaryDirectory() as folder, torch_threads(max(threads)):
        inputs = Inputs.draw(model, path, batch, seed, density, Path(folder))
        settings = {
            "model": "fashion_mnist" if path is None else path.name,
            "device": "cpu",
            "dtype": "float32",
            "density": density,
            "batch": batch,
            "busy": busy,
            "cores": available,
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
            "target": TARGET,
            "repeat": repeat,
            "budget_seconds": budget,
            "seed": seed,
        }
        record = new_record("load", None, settings, baseline=BASELINE)
        rate = spin_rate()
        for number, (name, count) in enumerate(cells, 1):
            click.echo(f"[{number}/{len(cells)}] {name}, threads {count}", err=True)
            task = TASKS[name]
            with torch_threads(count):
                entry = measure(
                    task.make(inputs, count),
                    count,
                    tolerance=task.tolerance,
                    busy=busy,
                    available=available,
                    rate=rate,
                    repeat=repeat,
                    budget=budget,
                )
            record["cells"].append({"label": {"task": name, "threads": count}, **entry})
            write(record, out)
    finish(record, out)
