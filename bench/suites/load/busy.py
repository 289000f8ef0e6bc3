"""Load on the machine: processes that keep cores busy, and what a fair scheduler leaves beside them."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

from tarflow_fast import TarFlowError

from ...common.harness import wall

# The loop ends with the process that started it, however that ends: nobody else holds the other end of its standard
# input, which the system then closes. Ctrl-C, which reaches the loop too, ends it without a traceback.
_LOOP = """
import os, signal, sys, threading

def watch():
    sys.stdin.buffer.read()
    os._exit(0)

signal.signal(signal.SIGINT, signal.SIG_DFL)
threading.Thread(target=watch, daemon=True).start()
sys.stdout.write("x")
sys.stdout.flush()
while True:
    pass
"""
SETTLE = 0.1  # seconds until the scheduler has spread new processes over the cores
_CALIBRATION = 200_000  # iterations whose time gives the rate of `spin`


@contextmanager
def busy_processes(count: int) -> Iterator[list[int]]:
    """`count` processes, each of one thread that never waits, spin while the context lasts; yields their numbers.

    All of them spin when it is entered, and none is left when it is gone, be it by an exception, Ctrl-C or the end of
    this process. Raises TarFlowError where a process cannot be started.
    """
    # They stay in this session: on Linux the processes of another are a scheduling group with a share of its own.
    command = [sys.executable, "-I", "-S", "-c", _LOOP]
    with ExitStack() as stack:
        processes: list[subprocess.Popen[bytes]] = []
        for _ in range(count):
            process = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            stack.callback(process.kill)
            processes.append(process)
        for process in processes:
            if process.stdout is None or process.stdout.read(1) != b"x":
                raise TarFlowError("a process that was to keep a core busy has ended")
        if count:
            time.sleep(SETTLE)
        yield [process.pid for process in processes]


def fair_slowdown(threads: int, busy: int, cores: int) -> float:
    """Returns max(1, (t + n) / c): how many times as long t <= c threads take beside n busy processes on c cores.

    On a quiet machine each of the t threads has a core. Beside n threads that never wait, t + n share c cores, and a
    fair scheduler gives each of them the part min(1, c / (t + n)) of a core. A task whose threads all work all the time
    then takes the inverse of that part as long; one that is serial at times has there the lower share of t = 1.
    """
    if threads > cores:
        raise ValueError(f"{threads} threads on {cores} cores")
    return max(1.0, (threads + busy) / cores)


def spin(threads: int, iterations: int) -> None:
    """Makes so many rounds of a hash in each thread, the yardstick: the threads work side by side without the GIL,
    without memory, and never wait for each other."""
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(threads):
            pool.submit(hashlib.pbkdf2_hmac, "sha256", b"yardstick", b"", iterations)


def spin_rate() -> float:
    """Returns the rounds that one thread of `spin` makes in a second: the best of three."""
    return _CALIBRATION / min(wall(lambda: spin(1, _CALIBRATION)) for _ in range(3))
