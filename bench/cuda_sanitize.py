"""A small run of the CUDA kernel, by itself and under compute-sanitizer; `python -m bench.cuda_sanitize` is it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tarflow_fast import TarFlowConfig
from tarflow_fast.engine import Condition, Guidance, block_weights
from tarflow_fast.engine.cuda_engine import CudaEngine
from tarflow_fast.noise import latent_noise
from tarflow_fast.solvers.trail import Trail

from .cells import random_model
from .gpu_cells import GUIDANCE, MODELS
from .machine import ROOT

SIZES = {
    "small": TarFlowConfig(1, 8, 2, 64, 1, 2, num_classes=3),  # T = 16
    "wide": replace(MODELS["afhq"], img_size=16, layers_per_block=1),  # T = 4, of the real width
}
BATCHES = (2, 32)  # guided: one tile of 8 rows, and as many as a launch takes
WINDOW = 3  # tokens of a sample
DTYPES = (torch.float32, torch.bfloat16)
COMMAND = (sys.executable, "-m", "bench.cuda_sanitize")
TOOLKIT = "/usr/local/cuda"  # where it is unless CUDA_HOME says otherwise
PLAIN = "plain"  # the run by itself
TOOLS = ("memcheck", "racecheck")
FOUND = 86  # exit code of a tool that has found something; a run that fails by itself has another
TAIL = 20  # lines of the output that the record keeps of a run that was not ok


def small_run(device: torch.device) -> None:
    """All of the kernel's modes, each twice, for few and many rows. Raises RuntimeError unless all is finite and the
    second time gives the same bits."""
    for name, sizes in SIZES.items():
        weights = block_weights(random_model(sizes, 0).state_dict(), sizes, 0)
        for dtype in DTYPES:
            engine = CudaEngine(weights, device=device, dtype=dtype)
            for batch in BATCHES:
                z = latent_noise(0, range(batch), sizes.num_patches, sizes.token_dim).to(device)
                labels = torch.arange(batch, device=device) % sizes.num_classes
                first, second = (_images(engine, z, labels) for _ in range(2))
                if not torch.isfinite(first).all() or not torch.equal(first, second):
                    raise RuntimeError(f"{name}, {dtype}, batch {batch}: not finite, or not the same bits twice")


def _images(engine: CudaEngine, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(3, B, T, D): of the sequential pass, of one parallel pass over its result, and of the passes of a window."""
    condition, (B, T, _) = Condition(labels, Guidance(GUIDANCE)), z.shape
    state = engine.begin(z, condition)
    engine.reverse(state)
    sequential = state.x.clone()
    engine.fixed_point(state, 1, T)
    other = engine.begin(z, condition)
    engine.converge(other, z, [1] * B, Trail(other, tol=1e-3), window=WINDOW, most=T)
    return torch.stack([sequential, state.x, other.x])


def find_sanitizer() -> str | None:
    """On the PATH, or in a CUDA toolkit: that of the nvcc on the PATH, of CUDA_HOME, or TOOLKIT."""
    nvcc = shutil.which("nvcc")
    folders = [] if nvcc is None else [Path(nvcc).resolve().parent]
    folders += [Path(home) / "bin" for home in (os.environ.get("CUDA_HOME"), TOOLKIT) if home]
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *map(str, folders)])
    return shutil.which("compute-sanitizer", path=path)


def run_sanitizer(seconds: float) -> dict[str, Any]:
    """{ok, reason, runs}: the small run in a process of its own, by itself and under each tool, all at once; each is
    stopped after `seconds`, which is no success.

    runs: [{name, outcome, seconds, tail}]; outcome: "ok", "findings" of a tool, "failed" or "stopped"; tail: the last
    lines of the output, None if ok. reason: why there is no run under the tools, or None.
    """
    commands = {PLAIN: list(COMMAND)}
    sanitizer = find_sanitizer()
    if sanitizer is not None:
        # Only the kernel is watched, not torch's; backtraces of the host would be paths of this machine.
        options = ["--kernel-regex", "kns=pass_kernel", "--show-backtrace", "no", "--error-exitcode", str(FOUND)]
        commands |= {tool: [sanitizer, "--tool", tool, *options, *COMMAND] for tool in TOOLS}
    with ThreadPoolExecutor(len(commands)) as pool:
        runs = list(pool.map(lambda name: _run(name, commands[name], seconds), commands))
    return {
        "ok": all(run["outcome"] == "ok" for run in runs),
        "reason": "compute-sanitizer not found" if sanitizer is None else None,
        "runs": runs,
    }


def _run(name: str, command: list[str], seconds: float) -> dict[str, Any]:
    started = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        outcome = {0: "ok", FOUND: "findings"}.get(process.returncode, "failed")
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # what a tool watches is its child
        output, _ = process.communicate()
        outcome = "stopped"
        output += f"\nstopped after {seconds:.0f} s"
    tail = None if outcome == "ok" else output.replace(f"{ROOT}/", "").splitlines()[-TAIL:]
    return {"name": name, "outcome": outcome, "seconds": time.monotonic() - started, "tail": tail}


if __name__ == "__main__":
    small_run(torch.device("cuda"))
