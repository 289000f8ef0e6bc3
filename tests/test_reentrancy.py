"""A native pass begun inside another of the same thread, by a progress callback or a signal's handler, goes on in this
thread alone: with the results that it always has, and without waiting for the pass that waits for it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

import pytest
import torch
from cases import random_images, random_latents, random_model
from torch import Tensor

from tarflow_fast import Sampler
from tarflow_fast.backend.cpu.engine import CpuEngine, cpu_missing
from tarflow_fast.engine import Condition
from tarflow_fast.models.cpu_density import cpu_density

if cpu_missing() is not None:
    pytest.skip(str(cpu_missing()), allow_module_level=True)

SMALL = random_model(num_classes=2)
LARGE = random_model(5, img_size=24, channels=128)  # its passes take long enough for a callback


def sampled() -> Tensor:
    return Sampler(SMALL, threads=2, solver="sequential").sample(6, [0, 1]).images


def density() -> Tensor:
    tokens = SMALL.patchify(random_images(SMALL, 6))
    return cpu_density(SMALL.blocks, tokens, gradient=True, threads=2).outputs


def test_from_a_progress_callback() -> None:
    engine = CpuEngine(LARGE.block_weights(0), dtype=torch.float32, threads=2)
    z, alone, within = random_latents(LARGE, 150), (sampled(), density()), []
    plain = engine.begin(z, Condition())
    engine.reverse(plain)

    def progress(_: int) -> None:
        if not within:
            within.append((sampled(), density()))

    state = engine.begin(z, Condition())
    engine.reverse(state, progress)
    assert torch.equal(state.x, plain.x)
    assert all(map(torch.equal, within[0], alone))


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there is no timer whose signal can be handled")
@pytest.mark.parametrize("outer", ["sampling", "density"])
def test_from_a_signal_handler(outer: str) -> None:
    images, sampler = random_images(LARGE, 100), Sampler(LARGE, threads=2, solver="sequential")
    passes: dict[str, Callable[[], Tensor]] = {
        "sampling": lambda: sampler.sample(60).images,
        "density": lambda: cpu_density(LARGE.blocks, LARGE.patchify(images), gradient=True, threads=2).outputs,
    }
    alone, plain, within = sampled(), passes[outer](), []
    before = signal.signal(signal.SIGALRM, lambda *_: within.append((sampled(), density())))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        while not within:
            assert torch.equal(passes[outer](), plain)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert torch.equal(within[0][0], alone)


def test_other_threads_take_turns() -> None:
    alone, found = sampled(), []
    callers = [threading.Thread(target=lambda: found.append(sampled())) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(torch.equal(images, alone) for images in found)
    assert len(found) == 4
