"""Calls of the native CPU engine: several at once, interrupted ones, their progress, and those of a forked child."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import TESTS, random_latents, random_model
from cpu_engines import engine_of, inverse
from engines import expected
from tolerances import GOLDEN, assert_close
from torch import Tensor

from tarflow_fast.backend.cpu.engine import CpuEngine
from tarflow_fast.engine import Condition


def test_several_callers_at_once() -> None:
    model = random_model(5, num_classes=3, img_size=16, channels=128)
    engine = engine_of(model, threads=2)
    latents = [random_latents(model, 1 + seed % 3, seed) for seed in range(12)]
    wanted = [inverse(engine, z, Condition())[0] for z in latents]
    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(lambda z: inverse(engine, z, Condition())[0], latents))
    assert all(map(torch.equal, got, wanted))


def long_run() -> tuple[CpuEngine, Tensor]:
    """Several seconds of work."""
    model = random_model(5, img_size=64, channels=256, layers_per_block=2)
    return engine_of(model, threads=2), random_latents(model, 64)


@pytest.mark.parametrize("parallel", [False, True], ids=["sequential", "parallel"])
def test_ctrl_c_interrupts_within_a_second(parallel: bool) -> None:
    """A second in which this process computes: other processes may take the cores for as long as they like."""
    engine, z = long_run()
    state = engine.begin(z, Condition())
    stops = range(1024 - 63, 1025)
    run = (lambda: engine.fixed_point(state, [1] * 64, stops)) if parallel else (lambda: engine.reverse(state))
    sent = []

    def interrupt() -> None:
        begun = time.process_time()
        while time.process_time() < begun + 0.3:  # of the pass, as nothing else is computed meanwhile
            time.sleep(0.01)
        sent.append(time.process_time())
        os.kill(os.getpid(), signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs without
    try:
        interrupter.start()
        with pytest.raises(KeyboardInterrupt):
            run()
        assert time.process_time() - sent[0] < 1
    finally:
        interrupter.join()
        signal.signal(signal.SIGINT, handler)
    small = random_model()
    z = random_latents(small, 2)
    wanted, _ = expected(small, 0, z, Condition())
    assert_close(inverse(engine_of(small, threads=2), z, Condition())[0], wanted, GOLDEN)  # the threads are still well


def test_what_progress_raises_ends_the_pass() -> None:
    engine, z = long_run()

    def refuse(steps: int) -> None:
        raise LookupError(steps)

    with pytest.raises(LookupError):
        engine.reverse(engine.begin(z, Condition()), refuse)


def test_progress_counts_a_long_pass() -> None:
    model = random_model(5, img_size=24, channels=128)
    engine, steps = engine_of(model, threads=2), []
    engine.reverse(engine.begin(random_latents(model, 150), Condition()), steps.append)
    assert sum(steps) == model.config.num_patches - 1
    assert min(steps) > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_has_threads_of_its_own() -> None:
    code = """
import os, sys, torch
sys.path[:0] = sys.argv[1:]
from cases import random_latents, random_model
from cpu_engines import engine_of, inverse
from tarflow_fast.engine import Condition
model = random_model(); z = random_latents(model, 2); engine = engine_of(model, threads=2)
wanted, _ = inverse(engine, z, Condition())
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(inverse(engine, z, Condition())[0], wanted) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(TESTS)], timeout=120, check=False)
    assert done.returncode == 0
