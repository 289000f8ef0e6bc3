"""Commands that may hang or crash: each is a process of its own, which is ended when its time is up."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

TAIL = 20
"""How many lines of its output are kept of a process that went wrong."""
PAUSE = 0.02
"""How many seconds pass between looks at the processes."""


class Done(NamedTuple):
    """How a process ended.

    Attributes:
        code: Its exit code, or None if it was ended.
        output: What it printed, without the path of the folder.
        seconds: How long it ran.
    """

    code: int | None
    output: str
    seconds: float

    @property
    def tail(self) -> list[str]:
        """Returns the last lines of the output."""
        return self.output.splitlines()[-TAIL:]


def run_all(commands: Mapping[str, Sequence[str]], seconds: float, folder: Path) -> dict[str, Done]:
    """Runs commands in a folder, all at once, and ends each with its children after so many seconds.

    None of them outlives this function, be it by an exception or Ctrl-C.
    """
    started, done = time.monotonic(), dict[str, Done]()
    with contextlib.ExitStack() as stack:
        running: dict[str, tuple[subprocess.Popen[bytes], IO[bytes]]] = {}
        for name, command in commands.items():
            output: IO[bytes] = stack.enter_context(tempfile.TemporaryFile())
            how: dict[str, Any] = {"stdout": output, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
            process = stack.enter_context(subprocess.Popen(command, cwd=folder, start_new_session=True, **how))
            stack.callback(_end, process)
            running[name] = process, output
        while len(done) < len(running):
            passed = time.monotonic() - started
            for name, (process, output) in running.items():
                code, late = process.poll(), passed > seconds
                if name in done or (code is None and not late):
                    continue
                if code is None:
                    _end(process)
                output.seek(0)
                text = output.read().decode("utf-8", "replace").replace(f"{folder}{os.sep}", "")
                text += f"\nstopped after {seconds:.0f} s" if code is None else ""
                done[name] = Done(code, text, passed)
            time.sleep(PAUSE)
    return {name: done[name] for name in commands}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and its children: what a tool watches is its child."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            if sys.platform == "win32":
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
