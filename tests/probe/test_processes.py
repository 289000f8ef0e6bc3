"""Commands that hang, crash or print much are ended and told of, and none outlives an exception."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tarflow_fast.probe import processes
from tarflow_fast.probe.processes import run_all


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", code)


def test_what_each_printed_and_how_it_ended(tmp_path: Path) -> None:
    commands = {
        "much": python("print('x' * 10**6); print('last')"),
        "fails": python("import os, sys; print(os.getcwd() + os.sep + 'file', file=sys.stderr); sys.exit(3)"),
    }
    found = run_all(commands, 60.0, tmp_path.resolve())
    assert list(found) == ["much", "fails"]
    assert (found["much"].code, len(found["much"].output)) == (0, 10**6 + 6)
    assert found["much"].tail[-1] == "last"
    assert (found["fails"].code, found["fails"].output) == (3, "file\n")


def test_they_run_at_once(tmp_path: Path) -> None:
    """Each waits for what the other one writes."""
    wait = "import os, time\nopen('{}', 'w').close()\nwhile not os.path.exists('{}'): time.sleep(0.01)"
    found = run_all({"a": python(wait.format("a", "b")), "b": python(wait.format("b", "a"))}, 60.0, tmp_path)
    assert [done.code for done in found.values()] == [0, 0]


def test_what_hangs_is_stopped(tmp_path: Path) -> None:
    hangs = "import time; print('begun', flush=True); time.sleep(10**6)"
    found = run_all({name: python(hangs) for name in "ab"}, 1.5, tmp_path)
    for done in found.values():
        assert (done.code, done.output) == (None, "begun\n\nstopped after 2 s")
        assert done.seconds >= 1.5


def test_none_outlives_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    me = psutil.Process()
    before, seen = {child.pid for child in me.children()}, list[int]()

    def interrupt(seconds: float) -> Any:
        seen.extend({child.pid for child in me.children()} - before)
        raise KeyboardInterrupt

    monkeypatch.setattr(processes.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_all({"waits": python("import time; time.sleep(10**6)")}, 60.0, tmp_path)
    assert len(seen) == 1
    assert not psutil.pid_exists(seen[0])
