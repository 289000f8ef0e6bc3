"""What memory held before changes nothing: neither NaN, nor numbers so large that their products overflow.

NaN shows that a place was read; a large number shows what a mask, or a comparison that is false for NaN, would hide.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import KERNEL_DEVICE, TESTS, random_latents, random_model
from engines import BACKENDS
from torch import Tensor

from tarflow_fast.backend import make_engines
from tarflow_fast.backend.cpu.engine import cpu_missing
from tarflow_fast.engine import BlockEngine, BlockState, Condition, Guidance
from tarflow_fast.engine.backend import Request
from tarflow_fast.models.tarflow import TarFlow

WRITTEN = {"keys_values", "x", "token_log_det", "h", "queries", "attended", "hidden", "parameters", "change"} | {
    *("residual", "partial", "partials")
}
"""Buffers of caches, workspaces and windows that a pass writes before it reads them."""


def buffers(holder: Any) -> Iterator[tuple[str, Tensor]]:
    """Those of `WRITTEN` in an engine's cache, whatever it is made of."""
    for name, value in {**vars(holder), **vars(holder).get("buffers", {})}.items():
        if isinstance(value, Tensor) and name in WRITTEN:
            yield name, value
        elif isinstance(value, dict) and name == "windows":
            for window in value.values():
                yield from buffers(window)
        elif name == "scratch":
            yield from buffers(value)


def spoil(state: BlockState, held: float) -> set[str]:
    """Fills them; returns which there were."""
    names = set()
    for name, buffer in buffers(state.cache):
        buffer.fill_(held)
        names.add(name)
    return names


def passes(engine: BlockEngine, model: TarFlow, condition: Condition, held: float) -> list[Tensor]:
    """A sequential pass; one window after another against the prefix; a window for each sample: spoilt before each."""
    z, T = random_latents(model, 2), model.config.num_patches
    out = []
    state = engine.begin(z, condition)
    assert "keys_values" in spoil(state, held)
    state.x[:, 1:] = held
    state.token_log_det[:, 1:] = held
    engine.reverse(state)
    out += [state.x, state.token_log_det]
    state = engine.begin(z, condition)
    spoil(state, held)
    for start, stop in ((1, 4), (4, 5), (5, T)):
        out += [*engine.fixed_point(state, start, stop)]
    out += [state.x, state.token_log_det]
    if engine.ragged:
        state = engine.begin(z, condition)
        spoil(state, held)
        for starts, stops in (([1, 1], [3, 6]), ([3, 6], [3, 9]), ([3, 9], [12, 9]), ([12, 9], [T, T])):
            out += [*engine.fixed_point(state, starts, stops)]
        out += [state.x, state.token_log_det]
    return [tensor.clone() for tensor in out]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", [Guidance(), Guidance(1.5, "ab", 0.7, True)], ids=["plain", "guided"])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_what_buffers_held_changes_nothing(backend: str, rule: Guidance, dtype: torch.dtype) -> None:
    size = (
        {"num_blocks": 2, "layers_per_block": 1, "img_size": 6} if backend == "triton" else {}
    )  # its interpreter is slow
    model = random_model(num_classes=3, **size)
    device = KERNEL_DEVICE if backend in ("triton", "cuda") else torch.device("cpu")
    weights = model.block_weights(1)
    engine = make_engines(backend, [weights], Request(device, dtype, False))[0]
    condition = Condition(torch.tensor([2, -1]), rule)
    wanted = passes(engine, model, condition, 0.0)
    assert all(tensor.isfinite().all() for tensor in wanted)
    for held in (torch.nan, 1e30, -3e38, torch.inf)[: 2 if backend == "triton" else 4]:
        assert all(map(torch.equal, passes(engine, model, condition, held), wanted)), held


@pytest.mark.skipif(sys.platform != "linux" or cpu_missing() is not None, reason="it is glibc that fills memory")
@pytest.mark.slow
def test_what_the_heap_held_changes_nothing() -> None:
    """The memory of the C++ passes, and of torch's: 0x7e7e7e7e is 8e37 in fp32, and 0x7e7e the same in bf16."""
    code = """
import hashlib, sys, torch
sys.path[:0] = sys.argv[1:]
from cases import random_images, random_latents, random_model
from tarflow_fast import Sampler, denoise
digest = hashlib.sha256()
model = random_model(num_classes=3); z, x = random_latents(model, 3), random_images(model, 3)
for dtype in (torch.float32, torch.bfloat16):
    for solver in ("sequential", "adaptive"):
        sampler = Sampler(model, backend="cpu", solver=solver, dtype=dtype, threads=2)
        for guidance in (0, 1.5):
            images = sampler.reverse(z, [0, 2, -1], guidance)
            digest.update(images.numpy().tobytes())
    digest.update(denoise(model, x, 1, noise_std=0.1, dtype=dtype, backend="cpu", threads=2).numpy().tobytes())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        digest.update(model.set_density("cpu")(x, torch.tensor([0, 1, -1]))[0].numpy().tobytes())
print(digest.hexdigest())
"""

    def run(perturb: str) -> str:
        command = [sys.executable, "-W", "ignore", "-c", code, str(TESTS)]
        environment = {**os.environ, "MALLOC_PERTURB_": perturb}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=100).stdout

    assert run("0") == run(str(0x7E ^ 0xFF)) != ""
