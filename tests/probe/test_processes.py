"""What becomes of a probe's process: it may crash, hang, answer late or never, and the verdict names what it did."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from cases import ROOT, TESTS
from fake_device import fake
from probe_jobs import job_of

from tarflow_fast.engine.verdict import Row, Size, Verdict
from tarflow_fast.probe import parent
from tarflow_fast.probe.job import Limits

SHORT = Limits(check=3.0)

ENDS = {
    "none": (Limits(), " checks passed in "),
    "crashes": (Limits(), "accuracy, batch 2: it was ended by SIGABRT (Fatal Python error: Aborted)"),
    "hangs": (SHORT, "accuracy, batch 2: no answer within "),
    "answers late": (SHORT, "accuracy, batch 2: no answer within "),
    "fails at import": (Limits(), "starting: it raised ImportError: kernels.so: undefined symbol"),
}
BEGUN = 'print(\'{"event": "cases", "count": 2}\\n{"event": "begin", "check": "first"}\', flush=True)'
ROW = '{"event": "done", "check": "first", "seconds": 1, "error": NaN, "allowed": 1, "fault": null}'


@pytest.fixture(scope="module")
def verdicts() -> dict[str, tuple[Verdict, list[Row], float]]:
    """The verdicts on all these, whose processes run side by side, with what was told on the way and the seconds."""

    def one(fault: str) -> tuple[Verdict, list[Row], float]:
        rows: list[Row] = []
        started = time.monotonic()
        verdict = parent.probe(job_of(fake(fault), Size(2, False)), ENDS[fault][0], lambda row, count: rows.append(row))
        return verdict, rows, time.monotonic() - started

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(ENDS, pool.map(one, ENDS), strict=True))


@pytest.mark.skipif(sys.platform == "win32", reason="names of signals")
@pytest.mark.parametrize("fault", ENDS)
def test_how_it_ends(verdicts: dict[str, tuple[Verdict, list[Row], float]], fault: str) -> None:
    verdict, rows, _ = verdicts[fault]
    assert ENDS[fault][1] in verdict.reason
    assert verdict.proven == (fault == "none")
    assert verdict.lasting
    assert list(verdict.rows) == rows
    assert [row.check for row in rows if row.fault is not None] == ([] if verdict.proven else [rows[-1].check])


def test_one_that_passes_is_timed(verdicts: dict[str, tuple[Verdict, list[Row], float]]) -> None:
    verdict, rows, _ = verdicts["none"]
    assert verdict.seconds.keys() == {"torch", "fake, none"}
    assert len(rows) > 5


@pytest.mark.parametrize("fault", ["hangs", "answers late"])
def test_none_outlives_its_time(verdicts: dict[str, tuple[Verdict, list[Row], float]], fault: str) -> None:
    verdict, _, seconds = verdicts[fault]
    assert float(verdict.reason.split()[-6]) >= SHORT.check
    assert seconds < Limits().start + 2 * SHORT.check  # it would sleep for an hour
    assert not parent._running


def test_no_process_is_left(verdicts: dict[str, tuple[Verdict, list[Row], float]]) -> None:
    assert [p for p in psutil.Process().children(recursive=True) if "probe" in " ".join(p.cmdline())] == []


@pytest.mark.parametrize(
    ("script", "reason", "lasting"),
    [
        ("", "starting: it ended with exit code 0", True),
        ("import sys; sys.exit('no torch')", "starting: it ended with exit code 1 (no torch)", True),
        (f"{BEGUN}; print('{{', flush=True)", "first: it ended with exit code 0", True),
        (f"{BEGUN}; print('no JSON', flush=True); import time; time.sleep(60)", "first: it closed its output", True),
        (f'{BEGUN}; print(\'{{"event": "end"}}\')', "first: it ended without times", True),
        (f"{BEGUN}; print('{ROW}')", "first: it ended with exit code 0", True),
        (
            f'{BEGUN}; print(\'{{"event": "failed", "reason": "no room", "memory": true}}\')',
            "first: no room",
            False,
        ),
        (
            f"{BEGUN}; print('{ROW}'.replace('null', '\"0.1 off\"'), flush=True); import os; os._exit(3)",
            "first: 0.1 off",
            True,
        ),
    ],
)
def test_whatever_a_process_says(monkeypatch: pytest.MonkeyPatch, script: str, reason: str, lasting: bool) -> None:
    monkeypatch.setattr(parent, "BOOT", script)
    monkeypatch.setattr(parent, "PATIENCE", 0.2)
    verdict = parent.probe(job_of(fake(), Size(2, False)), Limits(start=60, check=60))
    assert not verdict.proven
    assert verdict.reason.startswith(reason)
    assert verdict.lasting == lasting
    assert not parent._running


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL", "SIGSEGV"])
def test_a_process_that_others_end_says_nothing_of_the_backend(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(parent, "BOOT", f"{BEGUN}; import os; os.kill(os.getpid(), {int(getattr(signal, name))})")
    verdict = parent.probe(job_of(fake()))
    assert f"first: it was ended by {name}" in verdict.reason
    assert verdict.lasting == (name == "SIGSEGV")


def test_the_end_of_this_process_says_nothing_of_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parent, "BOOT", f"{BEGUN}; import time; time.sleep(3600)")
    monkeypatch.setattr(parent, "_leaving", threading.Event())
    found: list[Verdict] = []
    asking = threading.Thread(target=lambda: found.append(parent.probe(job_of(fake()))))
    asking.start()
    while not parent._running:
        time.sleep(0.01)
    parent._end_all()
    asking.join(60)
    assert [verdict.lasting for verdict in found] == [False]


@pytest.mark.parametrize("limits", [Limits(start=0.3), Limits(total=0.3)])
def test_limits_of_the_start_and_of_all(monkeypatch: pytest.MonkeyPatch, limits: Limits) -> None:
    monkeypatch.setattr(parent, "BOOT", "import time; time.sleep(3600)")
    verdict = parent.probe(job_of(fake()), limits)
    assert verdict.reason == "starting: no answer within 0 s, and it was ended"
    assert not verdict.lasting  # a disk or a machine that is slow


def test_what_cannot_be_sent_is_not_proven() -> None:
    backend = replace(fake(), describe=lambda device: "")
    verdict = parent.probe(job_of(backend))
    assert not verdict.proven
    assert not verdict.lasting
    assert verdict.reason.startswith("it cannot be sent to another process: ")


def test_no_process_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    verdict = parent.probe(job_of(fake()))
    assert verdict == Verdict(
        False, "no process could be started for the probe: [Errno 2] No such file or directory: '/nowhere/python'",
        lasting=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
def test_it_ends_with_its_parent(tmp_path: Path) -> None:
    """Also with one that is killed, and can see to nothing any more."""
    code = (
        "from fake_device import fake; from probe_jobs import job_of; from tarflow_fast.probe import parent\n"
        "seen = parent._follow\n"
        "def follow(process, *rest):\n    print(process.pid, flush=True)\n    return seen(process, *rest)\n"
        "parent._follow = follow\nparent.probe(job_of(fake('hangs')))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS)])}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as asking:
        assert asking.stdout is not None
        probing = psutil.Process(int(asking.stdout.readline()))
        asking.kill()
    psutil.wait_procs([probing], timeout=60)
    assert not probing.is_running()
