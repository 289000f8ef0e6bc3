"""Every test runs under what is set here: processes side by side, fixed seeds, a limit of time, and hypothesis without
deadlines or a database of its own.

Triton kernels run on the GPU where there is one, else in Triton's interpreter; so does the CUDA engine's, else in its
emulation.
"""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from remarks import Remarks

from tarflow_fast.errors import TarFlowWarning

pytest.register_assert_rewrite("checkpoint_files", "engine_laws")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before any is imported
    from interpreter import patch_once

    patch_once()

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # of a job in the background, whose processes would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # the models are too small to gain from more

# How long an example takes says what else the machine does, and is no fault of a test.
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("suite", untimed, derandomize=True, database=None)
settings.load_profile("suite")


@pytest.fixture
def remarks() -> Iterator[Remarks]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TarFlowWarning)
        yield Remarks(caught)


MOST_PROCESSES = 8  # each of them imports torch, which takes longer than an eighth of the tests
SLOW_CASES = Path(__file__).with_name("slow_cases.txt")
SECONDS, SLOW_SECONDS = 120, 600  # that a test may take, on a machine that does other things as well


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Runs tests in a process a core, if pytest-xdist is there; in this one with `-n 0`, under a debugger, and if they
    are named (`file.py::test`), as other processes would then take longer to start than they save."""
    named = any("::" in argument for argument in config.args)
    within = hasattr(config, "workerinput")  # one of those processes
    if not config.pluginmanager.hasplugin("xdist") or within or named or config.option.usepdb:
        return
    if config.option.numprocesses is None and config.option.dist == "no":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        config.option.numprocesses = min(cores, MOST_PROCESSES) if cores > 1 else 0
        config.option.dist = "worksteal"  # some tests take a hundred times as long as others


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks what is in slow_cases.txt as slow: cases of which an interpreter, an emulation or a process takes most of a
    second, where others of the same test or file take little. Sets limits of time, if pytest-timeout is there and
    `--timeout` does not give another."""
    slow = set(SLOW_CASES.read_text(encoding="utf-8").splitlines())
    for item in items:
        if item.nodeid in slow:
            item.add_marker(pytest.mark.slow)
    if config.pluginmanager.hasplugin("timeout") and config.option.timeout is None:
        for item in items:
            item.add_marker(pytest.mark.timeout(SLOW_SECONDS if item.get_closest_marker("slow") else SECONDS))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _sequential_is_quickest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets "auto" take the exact solver: which one it takes depends on times, and these on what else a machine does."""
    from tarflow_fast.solvers import Costs, auto

    monkeypatch.setattr(auto, "measure", lambda engine, state, widths: Costs(1.0, {w: 9.0 * w for w in widths}))


@pytest.fixture(autouse=True)
def _first_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the Triton engine take the first tiles: on a GPU it would time all tiles for the sizes of every test."""
    if torch.cuda.is_available():
        from tarflow_fast.backend.triton import engine as triton_engine
        from tarflow_fast.backend.triton import plan as triton_plan

        def first(engine: object, workspace: object, shape: triton_plan.PassShape) -> triton_plan.Plan:
            return triton_plan.first(triton_plan.candidates(shape))

        monkeypatch.setattr(triton_engine.TritonEngine, "_tuned", first)


@pytest.fixture(autouse=True)
def _emulated_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        from cuda_emulation import emulated

        from tarflow_fast.backend.cuda import engine as cuda_engine

        monkeypatch.setattr(cuda_engine, "load_native", emulated)
