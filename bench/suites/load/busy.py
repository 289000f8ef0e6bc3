"""Load on the machine: processes that keep cores busy, and what a fair scheduler leaves beside them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from tarflow_fast import TarFlowError

# The loop ends with the process that started it, however that ends: nobody else holds the other end of its standard
# input, which the system then closes. Ctrl-C, which reaches the loop too, ends it without a traceback.
_LOOP = """
import os, signal, sys, threading

signal.signal(signal.SIGINT, signal.SIG_DFL)
threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(0)), daemon=True).start()
print(end="x", flush=True)
while True:
    pass
"""
SETTLE = 0.1  # seconds until the scheduler has spread new processes over the cores


@contextmanager
def busy_processes(count: int) -> Iterator[list[int]]:
    """Keeps so many processes of one thread spinning while the context lasts, none longer, and yields their numbers.
    Raises TarFlowError where a process cannot be started."""
    # They stay in this session: on Linux the processes of another are a scheduling group with a share of its own.
    command = [sys.executable, "-I", "-S", "-c", _LOOP]
    with ExitStack() as stack:
        processes: list[subprocess.Popen[bytes]] = []
        for _ in range(count):
            processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            stack.enter_context(processes[-1])
            stack.callback(processes[-1].kill)
        for process in processes:
            if process.stdout is None or process.stdout.read(1) != b"x":
                raise TarFlowError("a process that was to keep a core busy has ended")
        if count:
            time.sleep(SETTLE)
        yield [process.pid for process in processes]


def fair_slowdown(threads: int, busy: int, cores: int) -> float:
    """Returns max(1, (t + n) / c): how many times as long t <= c threads take beside n busy processes on c cores, if
    t + n threads never wait, and the scheduler gives each the part min(1, c / (t + n)) of a core."""
    if threads > cores:
        raise ValueError(f"{threads} threads on {cores} cores")
    return max(1.0, (threads + busy) / cores)
