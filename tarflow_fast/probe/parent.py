"""The process that asks: it starts a probe's process, follows what that tells, and ends it when its time is up."""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

import psutil

from ..engine.verdict import Row, Verdict
from ..errors import first_line, printable
from .child import BOOT
from .job import EngineJob, Job, Limits

STARTING = "starting"  # the first thing that a process does, before any check
FROM_OUTSIDE = (1, 2, 9, 15)  # signals that others send: SIGHUP, SIGINT, SIGKILL, SIGTERM
PATIENCE = 10.0  # seconds in which a process ends after it has closed its output
OnRow = Callable[[Row, int], None]
_running: set[subprocess.Popen[bytes]] = set()
_leaving = threading.Event()  # this process is about to end, and with it all probes


def probe(job: Job, limits: Limits | None = None, on_row: OnRow | None = None) -> Verdict:
    """Returns the verdict of a probe in a process of its own.

    That process is ended when one of the limits is reached, with all that it has started. What it was doing at that
    time, or when it crashed, is what went wrong.

    job: what to probe. limits: the time that it may take, by default `Limits()`. on_row: a function that is called with
    each check when it is done, and the number of all checks.
    """
    try:
        sent = pickle.dumps(job)
    except Exception as error:  # whatever an object from outside raises
        return Verdict(False, f"it cannot be sent to another process: {first_line(error)}", lasting=False)
    try:
        with _process(sent) as (process, stderr):
            return _follow(process, stderr, job, Limits() if limits is None else limits, on_row)
    except OSError as error:
        return Verdict(False, f"no process could be started for the probe: {first_line(error)}", lasting=False)


@contextlib.contextmanager
def _process(sent: bytes) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """Start the process, which is ended with the block if it has not ended before."""
    how: dict[str, Any] = {"start_new_session": True}
    if sys.platform == "win32":
        how = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", BOOT, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            **how,
        )
        _running.add(process)
        try:
            with contextlib.suppress(BrokenPipeError):
                assert process.stdin is not None
                process.stdin.write(b"%d\n%b" % (len(sent), sent))
                process.stdin.flush()
            yield process, stderr
        finally:
            end(process)
            _running.discard(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started."""
    with contextlib.suppress(psutil.Error):
        for each in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                each.kill()
    if process.returncode is None:  # its id is then still its own, also where it has just ended
        with contextlib.suppress(OSError):
            if sys.platform == "win32":
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    process.wait()


@atexit.register
def _end_all() -> None:
    """End the probes of a background thread, which does not outlive the main one."""
    _leaving.set()
    for process in list(_running):
        end(process)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_running.clear)  # they are the parent's


def _lines(pipe: IO[bytes]) -> queue.Queue[dict[str, Any] | None]:
    """Returns a queue of the messages that come, and None when no more can come."""
    messages: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def read() -> None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the pipe was closed, or a line is cut off
            for line in pipe:
                messages.put(json.loads(line))
        messages.put(None)

    threading.Thread(target=read, daemon=True).start()
    return messages


def _follow(
    process: subprocess.Popen[bytes], stderr: IO[bytes], job: Job, limits: Limits, on_row: OnRow | None
) -> Verdict:
    assert process.stdout is not None
    messages = _lines(process.stdout)
    rows: list[Row] = []
    seconds: dict[str, float] = {}
    check, count = STARTING, 0
    started = time.monotonic()
    until = started + limits.start

    def broke_off(reason: str, lasting: bool = True) -> Verdict:
        add(Row(check, fault=reason))
        return refused(lasting)

    def refused(lasting: bool = True) -> Verdict:
        first = next(row for row in rows if row.fault is not None)  # what comes after it may come of it
        return Verdict(False, f"{first.check}: {first.fault}", {}, tuple(rows), lasting or first is not rows[-1])

    def add(row: Row) -> None:
        rows.append(row)
        if on_row is not None:
            on_row(row, count)

    while True:
        try:
            message = messages.get(timeout=max(0.0, min(until, started + limits.total) - time.monotonic()))
        except queue.Empty:
            reason = f"no answer within {time.monotonic() - started:.0f} s, and it was ended"
            return broke_off(reason, lasting=check != STARTING)
        match message:
            case None:
                return broke_off(*_how_it_ended(process, stderr))
            case {"event": "cases", "count": int(number)}:
                count = number
            case {"event": "begin", "check": str(name)}:
                if name != check:
                    check, until = name, time.monotonic() + limits.check
            case {"event": "done", "check": str(name)}:
                fault = message["fault"]
                error, allowed = _number(message["error"]), _number(message["allowed"])
                add(Row(name, error, allowed, message["seconds"], None if fault is None else printable(fault)))
            case {"event": "timed", "seconds": dict(times)}:
                seconds = {str(name): float(taken) for name, taken in times.items()}
            case {"event": "failed", "reason": str(reason), "memory": bool(memory)}:
                return broke_off(printable(reason), lasting=not memory)
            case {"event": "end"}:
                break
    if any(row.fault is not None for row in rows):
        return refused()
    if isinstance(job, EngineJob) and not {job.name, job.default} <= seconds.keys():
        return broke_off("it ended without times")
    return Verdict(True, f"{len(rows)} checks passed in {time.monotonic() - started:.0f} s", seconds, tuple(rows))


def _number(value: object) -> float | None:
    """Returns a number that is finite, or None; JSON's NaN and infinity stand for errors without bounds."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _how_it_ended(process: subprocess.Popen[bytes], stderr: IO[bytes]) -> tuple[str, bool]:
    """Returns how a process ended that said nothing of it, with the first line of what Python wrote of that.

    With it comes whether that was its own doing: a user, a system without memory, or this process may have ended it.
    """
    try:
        code = process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        return "it closed its output and went on", True
    how = f"it ended with exit code {code}"
    if code < 0:
        with contextlib.suppress(ValueError):
            how = f"it was ended by {signal.Signals(-code).name}"
    with contextlib.suppress(OSError):
        stderr.seek(0)
        lines = stderr.read(2**16).decode("utf-8", "replace").strip().splitlines()
        said = next((line for line in lines if line.startswith(("Fatal Python error", "Windows fatal"))), "")
        said = said or (lines[-1] if lines else "")
        how += f" ({printable(said.strip())})" * bool(said)
    return how, -code not in FROM_OUTSIDE and not _leaving.is_set()
