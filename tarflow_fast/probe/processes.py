"""Commands that may hang or crash: each is a process of its own, which is ended when its time is up."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

TAIL = 20
"""How many lines of its output are kept of a process that went wrong."""


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
    """Runs commands in a folder, all at once, and ends each with its children after so many seconds."""

    def run(command: Sequence[str]) -> Done:
        started = time.monotonic()
        how: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, cwd=folder, start_new_session=True, **how)
        try:
            output, code = process.communicate(timeout=seconds)[0], process.returncode
        except subprocess.TimeoutExpired:
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)  # what a tool watches is its child
            process.kill()
            output, code = f"{process.communicate()[0]}\nstopped after {seconds:.0f} s", None
        return Done(code, output.replace(f"{folder}{os.sep}", ""), time.monotonic() - started)

    with ThreadPoolExecutor(len(commands)) as pool:
        return dict(zip(commands, pool.map(run, commands.values()), strict=True))
