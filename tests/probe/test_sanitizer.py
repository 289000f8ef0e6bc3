"""The CUDA kernel's small run: by itself in the emulation, and under tools that are scripts."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_emulation import IN_EMULATION
from probe_backends import EMULATED

from tarflow_fast.backend.cuda.engine import CudaEngine
from tarflow_fast.engine.shape import BlockShape
from tarflow_fast.probe import processes, sanitizer
from tarflow_fast.probe.sanitizer import FOUND, run_sanitizer, small_run

TINY = BlockShape(tokens=4, token_dim=4, channels=16, layers=1, heads=1, head_dim=16, hidden=64, classes=3)


@IN_EMULATION
@pytest.mark.parametrize("mode", ["reverse", "fixed_point", "iterate_on_device"])
def test_the_small_run_sees_bits_that_differ(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitizer, "SHAPES", {"tiny": TINY})
    monkeypatch.setattr(sanitizer, "BATCHES", (2,))
    small_run(torch.device("cpu"), EMULATED)
    right = getattr(CudaEngine, mode)

    def differs(engine: CudaEngine, state: Any, *arguments: Any, **options: Any) -> Any:
        done = right(engine, state, *arguments, **options)
        state.x += torch.randn_like(state.x)
        return done

    monkeypatch.setattr(CudaEngine, mode, differs)
    law = "converge: .* off in sample" if mode == "iterate_on_device" else "same bits again: .* other bits"
    with pytest.raises(RuntimeError, match=rf"tiny, torch\.float32, batch 2: {law}"):
        small_run(torch.device("cpu"), EMULATED)


def test_what_is_watched_has_all_rows_and_the_real_width() -> None:
    assert {2 * batch for batch in sanitizer.BATCHES} >= {64}
    assert any(sizes.channels == 768 for sizes in sanitizer.SHAPES.values())
    for sizes in sanitizer.SHAPES.values():
        assert sizes.tokens <= 16


def python(*lines: str) -> list[str]:
    return [sys.executable, "-c", "\n".join(lines)]


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts a compute-sanitizer on the PATH, a script of these lines; if not called, there is none. The small run prints
    a word."""

    def put(*lines: str) -> Path:
        path = tmp_path / "compute-sanitizer"
        path.write_text("\n".join(("#!/bin/sh", *lines)))
        path.chmod(0o755)
        return path

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(sanitizer, "TOOLKIT", str(tmp_path / "none"))
    monkeypatch.setattr(sanitizer, "COMMAND", tuple(python("print('ran')")))
    return put


def outcomes(found: dict[str, Any]) -> dict[str, str]:
    return {run["name"]: run["outcome"] for run in found["runs"]}


def test_the_sanitizer_runs_what_it_is_given_under_each_tool(tool: Callable[..., Path], tmp_path: Path) -> None:
    log = tmp_path / "log"
    tool(f'echo "$@" >> {log}', 'while [ "$1" != --error-exitcode ]; do shift; done', "shift 2", 'exec "$@"')
    found = run_sanitizer(60.0)
    assert found["ok"]
    assert found["reason"] is None
    assert outcomes(found) == {"plain": "ok", "memcheck": "ok", "racecheck": "ok"}
    assert all(run["tail"] is None for run in found["runs"])
    called = log.read_text()
    assert "--tool memcheck" in called
    assert "--tool racecheck" in called
    assert called.count(f"--error-exitcode {FOUND} {sys.executable} -c print('ran')") == 2


def test_findings_are_kept_and_no_success(tool: Callable[..., Path]) -> None:
    lines = [f"echo '========= {i} invalid read'" for i in range(30)]
    tool(*lines, f'[ "$2" = memcheck ] && exit {FOUND}', "exit 3")
    found = run_sanitizer(60.0)
    assert not found["ok"]
    assert outcomes(found) == {"plain": "ok", "memcheck": "findings", "racecheck": "failed"}
    tail = found["runs"][1]["tail"]
    assert tail[-1] == "========= 29 invalid read"
    assert len(tail) == processes.TAIL


@pytest.mark.slow
def test_a_run_that_hangs_is_stopped_with_all_its_children(tool: Callable[..., Path], tmp_path: Path) -> None:
    log = tmp_path / "log"
    work = f"i=0; while [ $i -lt 200 ]; do i=$((i + 1)); echo $i >> {log}; /bin/sleep 0.05; done"
    tool("echo begun", f"/bin/sh -c '{work}'", "echo after")
    found = run_sanitizer(2.0)
    assert outcomes(found)["memcheck"] == "stopped"
    assert not found["ok"]
    assert found["runs"][1]["tail"] == ["begun", "", "stopped after 2 s"]
    written = log.read_text()
    assert written
    time.sleep(0.5)
    assert log.read_text() == written


def test_a_small_run_that_fails_by_itself(tool: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitizer, "COMMAND", tuple(python("raise RuntimeError('no such launch')")))
    found = run_sanitizer(60.0)
    assert outcomes(found) == {"plain": "failed"}
    assert not found["ok"]
    assert found["reason"] == "compute-sanitizer not found"
    assert found["runs"][0]["tail"][-1] == "RuntimeError: no such launch"
