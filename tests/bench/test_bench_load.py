"""`bench load`: busy processes that never outlive their context, the fair share, and the suite from end to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from cases import random_model
from PIL import Image
from stand_in import bench

import tarflow_fast as tff
from bench.common import harness, machine, record
from bench.common.harness import Case, Rounds
from bench.suites.load import busy
from bench.suites.load import suite as load
from bench.suites.load.busy import busy_processes, fair_slowdown
from bench.suites.load.suite import SUITE, TASKS, Tasks
from tarflow_fast.backend.cpu.engine import cpu_missing

PATIENCE = 20  # seconds, on a machine that is busy otherwise


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def wait_for(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def test_busy_processes_spin_until_the_context_ends() -> None:
    with busy_processes(2) as pids:
        assert len(set(pids)) == 2
        before = [cpu_seconds(pid) for pid in pids]
        assert wait_for(lambda: all(cpu_seconds(pid) > b + 0.05 for pid, b in zip(pids, before, strict=True)))
    assert all(map(gone, pids))
    with pytest.raises(ZeroDivisionError), busy_processes(1) as pids:
        _ = 1 / 0
    assert all(map(gone, pids))


def test_a_process_that_cannot_spin_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy, "_LOOP", "raise SystemExit(3)")
    with pytest.raises(tff.TarFlowError, match="has ended"), busy_processes(1):
        pytest.fail("entered")


PARENT = """
import subprocess, sys, time
from bench.suites.load.busy import busy_processes
with busy_processes(2) as pids:
    other = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    print(*pids, other.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("ending", ["SIGKILL", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_busy_processes_end_with_the_one_that_started_them(ending: str) -> None:
    """However it ends, and though another process that it has started lives on; Ctrl-C reaches the whole group."""
    number = getattr(signal, ending)
    with subprocess.Popen(
        [sys.executable, "-c", PARENT],
        cwd=machine.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as parent:
        assert parent.stdout is not None
        *pids, other = map(int, parent.stdout.readline().split())
        assert len(pids) == 2
        try:
            if ending == "SIGINT":
                os.killpg(parent.pid, number)
            else:
                parent.send_signal(number)
            assert wait_for(lambda: all(map(gone, pids)))
            assert ending == "SIGINT" or not gone(other)
        finally:
            for pid in [*pids, other]:
                if not gone(pid):
                    os.kill(pid, signal.SIGKILL)


def test_the_fair_share() -> None:
    assert fair_slowdown(1, 2, 2) == 1.5
    assert fair_slowdown(2, 2, 2) == 2
    assert fair_slowdown(1, 1, 4) == 1
    assert fair_slowdown(4, 8, 4) == 3
    with pytest.raises(ValueError, match="3 threads on 2 cores"):
        fair_slowdown(3, 1, 2)


class Machine:
    """A made-up one: a task takes 1 s, or 2 s beside busy processes."""

    def __init__(self) -> None:
        self.busy, self.now, self.log = 0, 0.0, ""

    @contextmanager
    def busy_processes(self, count: int) -> Iterator[None]:
        self.busy = count
        yield
        self.busy = 0

    def wall(self, run: Callable[[], object]) -> float:
        before = self.now
        run()
        return self.now - before

    def task(self) -> torch.Tensor:
        self.log += "T" if self.busy else "t"
        self.now += 2.0 if self.busy else 1.0
        return torch.zeros(1)


CASE = Case({"task": "sample", "threads": 1}, threads=1)


def measured(task: Callable[[], torch.Tensor], repeat: int = 4, tolerance: float = 0.0) -> Any:
    return load.measure(CASE, task, tolerance, 3, 2, Rounds(repeat, 1e9))


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(load, "busy_processes", made.busy_processes)
    monkeypatch.setattr(harness, "wall", made.wall)
    monkeypatch.setattr(harness, "REST", 0.0)
    return made


def test_quiet_and_busy_take_turns(made_up: Machine) -> None:
    entry = measured(made_up.task)
    assert made_up.log == "tt" + "tT" + "tT" * 4  # warm, the time of a call, the check, and the rounds
    assert entry["check"]["passed"]
    assert entry["fair"] == 2
    quiet, busy = entry["runs"]
    assert [run["name"] for run in entry["runs"]] == ["quiet", "busy"]
    assert quiet["seconds"] == [1.0] * 4
    assert busy["slowdown"] == {"samples": [2.0] * 4, "median": 2.0, "p20": 2.0, "p80": 2.0}


def test_short_tasks_are_repeated_within_a_sample(made_up: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "SAMPLE", 2.5)
    entry = measured(made_up.task, 1)
    assert made_up.log == "tt" + "tttTTT" * 2
    assert [run["seconds"] for run in entry["runs"]] == [[1.0], [2.0]]  # of one call


def test_a_task_whose_results_change_under_load_is_not_timed() -> None:
    children = psutil.Process().children

    def run() -> torch.Tensor:
        return torch.tensor([float(len(children()))])

    before = len(children())
    entry = measured(run, tolerance=0.5)
    assert not entry["check"]["passed"]
    assert entry["check"]["max_error"] == 3  # the busy processes
    assert entry["runs"] == []
    assert len(children()) == before


def made_up_record() -> dict[str, Any]:
    good = {"passed": True, "max_error": 0.0, "tolerance": 2e-5, "reason": None}
    cells: list[dict[str, Any]] = []
    for task, threads, slower in (("sample", 1, 1.6), ("sample", 2, 2.2), ("denoise", 1, 1.5), ("denoise", 2, 27.0)):
        runs = harness.runs_of({"quiet": [1.0] * 3, "busy": [0.9 * slower, slower, 1.1 * slower]})
        runs[1]["slowdown"] = harness.ratio(runs[1]["seconds"], runs[0]["seconds"])
        entry = {"check": good, "fair": fair_slowdown(threads, 2, 2), "runs": runs}
        cells.append({"label": {"task": task, "threads": threads}, **entry})
    bad = {**good, "passed": False, "max_error": 0.25, "reason": "differs by more than 2e-05"}
    cells.append({"label": {"task": "log_prob", "threads": 1}, "check": bad, "fair": 1.5, "runs": []})
    return {
        "suite": "load",
        "machine": {"cpu": "a processor", "os": "a system", "torch": "2.x", "load_average": 0.1},
        "settings": {
            "model": "fashion_mnist",
            "batch": 80,
            "dtype": "float32",
            "busy": 2,
            "cores": 2,
            "omp_wait_policy": None,
            "threads": 2,
        },
        "limits": {},
        "cells": cells,
    }


def test_the_table_has_slowdowns_and_what_is_fair() -> None:
    lines = SUITE.table(made_up_record()).splitlines()
    assert lines[1].endswith("OMP_WAIT_POLICY not set")
    assert lines[2] == "load:    2 busy processes on 2 cores; load average before that 0.1"
    rows = [line.split() for line in lines if line.startswith(("sample", "denoise", "log_prob"))]
    assert rows[3] == ["denoise", "2", "1", "27", "3", "27.00", "25.38-28.62", "2.00", "13.50", "0.0e+00"]
    assert rows[4] == ["log_prob", "1", "FAILED", *["-"] * 4, "1.50", "-", "2.5e-01"]
    assert lines[-1] == "FAILED task log_prob, threads 1: differs by more than 2e-05"


def test_the_picture_has_a_panel_for_each_task() -> None:
    made = made_up_record()
    figure = SUITE.figure(made)
    sample, denoise, log_prob = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["task sample", "task denoise", "task log_prob"]
    assert [bar.get_height() for bar in sample.patches] == [1.6, 2.2]
    assert [text.get_text() for text in sample.texts] == ["1.60×\n94%", "2.20×\n91%"]
    assert denoise.patches[1].get_height() == 27
    assert [text.get_text() for text in log_prob.texts] == ["check\nfailed"]


def saved_model(folder: Path) -> Path:
    model = random_model(num_classes=3)
    model.metadata = {"noise_type": "gaussian", "noise_std": 0.1}
    tff.save(model, folder / "model.safetensors")
    return folder / "model.safetensors"


@pytest.mark.skipif(cpu_missing() is not None, reason=str(cpu_missing()))
def test_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "SAMPLE", 0.001)
    monkeypatch.setattr(busy, "SETTLE", 0.0)
    threads, children = torch.get_num_threads(), len(psutil.Process().children())
    out = tmp_path / "run.json"
    library = [name for name in TASKS if not name.startswith("tarflow-fast")]
    tasks = [part for name in library for part in ("--task", name)]
    sizes = ("--batch", "3", "--threads", "1", "--busy", "1", "--repeat", "2")
    result = bench("load", "--model", saved_model(tmp_path), *tasks, *sizes, "--out", out)
    assert result.exit_code == 0, result.output
    assert torch.get_num_threads() == threads
    assert len(psutil.Process().children()) == children
    made = record.read(out)
    assert [cell["label"] for cell in made["cells"]] == [{"task": name, "threads": 1} for name in library]
    for cell in made["cells"]:
        assert cell["check"]["passed"]
        assert all(len(run["seconds"]) == 2 for run in cell["runs"])
        assert cell["runs"][1]["slowdown"]["median"] > 0
    assert made["settings"]["busy"] == 1
    assert SUITE.table(made) in result.output
    with Image.open(out.with_suffix(".png")) as image:
        image.verify()
    assert str(tmp_path) not in out.read_text()
    assert str(machine.ROOT) not in out.read_text()


def test_threads_beyond_the_cores_are_wrong_usage(tmp_path: Path) -> None:
    result = bench("load", "--threads", machine.cores() + 1, "--out", tmp_path / "run.json")
    assert result.exit_code == 2


@pytest.mark.slow
@pytest.mark.skipif(cpu_missing() is not None, reason=str(cpu_missing()))
def test_the_commands_do_what_the_library_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved_model(tmp_path)
    tasks = Tasks(tff.load(path), path, 3, 5, tmp_path)

    def run(name: str) -> torch.Tensor:
        return TASKS[name][0](tasks)

    # the command denoises, as its model was trained on noisy images
    torch.testing.assert_close(run("tarflow-fast sample"), run("denoise"), atol=2e-5, rtol=0)
    torch.testing.assert_close(run("tarflow-fast eval"), run("bits_per_dim"), atol=2e-5, rtol=0)
    (tmp_path / "data.npz").unlink()
    with pytest.raises(tff.TarFlowError, match="tarflow-fast eval ended with 2"):
        run("tarflow-fast eval")
