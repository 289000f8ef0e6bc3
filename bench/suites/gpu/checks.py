"""What `bench gpu` runs before anything is timed, in processes of their own: the tests of what runs on a GPU, and a
small run of the CUDA kernel, by itself and under compute-sanitizer. `python -m bench.suites.gpu.checks` is that run."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tarflow_fast.backend.cuda.engine import CudaEngine
from tarflow_fast.engine import Condition, Guidance
from tarflow_fast.solvers.trail import Trail

from ...common.machine import ROOT
from ...common.models import SANITIZED as SIZES
from ...common.models import inputs, random_model

# Whose tests run on a GPU where there is one.
KERNELS = ("norm_linear", "cached_attention", "affine_step", "affine_density", "fixed_point_update")
TRITON, CUDA = ("engine", "workspace", "graph", "plan"), ("engine", "same_bits", "refusals", "frontier")
FILES = (
    *("tests/engine/test_contract.py", "tests/engine/test_windows.py", "tests/backend/test_images.py"),
    "tests/backend/pytorch/test_compile.py",
    *(f"tests/kernels/test_{name}.py" for name in KERNELS),
    *(f"tests/backend/triton/test_{name}.py" for name in TRITON),
    *(f"tests/backend/cuda/test_{name}.py" for name in CUDA),
)
PYTEST = (sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist")
COMMAND = (sys.executable, "-m", "bench.suites.gpu.checks")
TOOLKIT = "/usr/local/cuda"  # where it is unless CUDA_HOME says otherwise
PLAIN = "plain"  # the small run by itself
TOOLS = ("memcheck", "racecheck")
FOUND = 86  # exit code of a tool that has found something; a run that fails by itself has another
TAIL = 20  # lines of the output that the record keeps of a run that was not ok
BATCHES = (2, 32)  # guided: one tile of 8 rows, and as many as a launch takes
WINDOW = 3  # tokens of a sample


class Done(NamedTuple):
    """code: None if the run was stopped. output: without paths of this machine."""

    code: int | None
    output: str
    seconds: float

    @property
    def tail(self) -> list[str]:
        return self.output.splitlines()[-TAIL:]


def _run_all(commands: Mapping[str, tuple[str, ...]], seconds: float) -> dict[str, Done]:
    """Runs commands all at once, and stops each after so many seconds."""

    def run(command: tuple[str, ...]) -> Done:
        started = time.monotonic()
        how: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **how)
        try:
            output, code = process.communicate(timeout=seconds)[0], process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # what a tool watches is its child
            output, code = f"{process.communicate()[0]}\nstopped after {seconds:.0f} s", None
        return Done(code, output.replace(f"{ROOT}/", ""), time.monotonic() - started)

    with ThreadPoolExecutor(len(commands)) as pool:
        return dict(zip(commands, pool.map(run, commands.values()), strict=True))


def run_tests(seconds: float) -> dict[str, Any]:
    """Returns {passed, failed, seconds, ok, tail} of pytest over FILES, a process for each file, all at once: most of
    the time kernels are being compiled. They are stopped after `seconds`, which is no success.

    failed: tests that failed or could not be set up. tail: the last lines of each file's run that went wrong, or None.
    """
    done = _run_all({file: (*PYTEST, file) for file in FILES}, seconds).values()
    counts = {"passed": 0, "failed": 0, "error": 0}
    for number, word in re.findall(r"(\d+) (passed|failed|error)", "".join(run.output for run in done)):
        counts[word] += int(number)
    # pytest ends with 5 where a file is skipped as a whole, as of an engine that was not built
    wrong = [run for run in done if run.code != 0 and not (run.code == 5 and " skipped" in run.output)]
    tail = [line for run in wrong for line in run.tail]
    found: dict[str, Any] = {"passed": counts["passed"], "failed": counts["failed"] + counts["error"]}
    return {**found, "seconds": max(run.seconds for run in done), "ok": not tail, "tail": tail or None}


def find_sanitizer() -> str | None:
    """Returns where compute-sanitizer is: on the PATH, or in a CUDA toolkit, that of the nvcc on the PATH, of
    CUDA_HOME, or TOOLKIT."""
    nvcc = shutil.which("nvcc")
    folders = [] if nvcc is None else [Path(nvcc).resolve().parent]
    folders += [Path(home) / "bin" for home in (os.environ.get("CUDA_HOME"), TOOLKIT) if home]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)]))


def run_sanitizer(seconds: float) -> dict[str, Any]:
    """Returns {ok, reason, runs}: the small run in a process of its own, by itself and under each tool, all at once;
    each is stopped after `seconds`, which is no success.

    runs: [{name, outcome, seconds, tail}]; outcome: "ok", "findings" of a tool, "failed" or "stopped"; tail: the last
    lines of the output, None if ok. reason: why there is no run under the tools, or None.
    """
    sanitizer = find_sanitizer()
    commands: dict[str, tuple[str, ...]] = {PLAIN: COMMAND}
    if sanitizer is not None:
        # Only the kernel is watched, not torch's; backtraces of the host would be paths of this machine.
        options = ("--kernel-regex", "kns=pass_kernel", "--show-backtrace", "no", "--error-exitcode", str(FOUND))
        commands |= {tool: (sanitizer, "--tool", tool, *options, *COMMAND) for tool in TOOLS}
    runs: list[dict[str, Any]] = []
    for name, done in _run_all(commands, seconds).items():
        outcome = {0: "ok", FOUND: "findings", None: "stopped"}.get(done.code, "failed")
        tail = None if outcome == "ok" else done.tail
        runs.append({"name": name, "outcome": outcome, "seconds": done.seconds, "tail": tail})
    reason = "compute-sanitizer not found" if sanitizer is None else None
    return {"ok": all(run["outcome"] == "ok" for run in runs), "reason": reason, "runs": runs}


def small_run(device: torch.device) -> None:
    """Runs all of the kernel's modes, each twice, for few and many rows. Raises RuntimeError unless all is finite and
    the second time gives the same bits."""
    for (name, sizes), dtype, batch in itertools.product(SIZES.items(), (torch.float32, torch.bfloat16), BATCHES):
        engine = CudaEngine(random_model(sizes, 0).block_weights(0), device=device, dtype=dtype)
        z, y = inputs(sizes, batch, 0, device)
        first, second = (_images(engine, z, Condition(y, Guidance(2.0))) for _ in range(2))
        if not torch.isfinite(first).all() or not torch.equal(first, second):
            raise RuntimeError(f"{name}, {dtype}, batch {batch}: not finite, or not the same bits twice")


def _images(engine: CudaEngine, z: torch.Tensor, condition: Condition) -> torch.Tensor:
    """(3, B, T, D): of the sequential pass, of one parallel pass over its result, and of the passes of a window."""
    B, T, _ = z.shape
    state = engine.begin(z, condition)
    engine.reverse(state)
    sequential = state.x.clone()
    engine.fixed_point(state, 1, T)
    other = engine.begin(z, condition)
    engine.iterate_on_device(other, z, [1] * B, Trail(other, tol=1e-3), window=WINDOW, max_passes=T)
    return torch.stack([sequential, state.x, other.x])


if __name__ == "__main__":
    small_run(torch.device("cuda"))
