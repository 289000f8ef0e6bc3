"""The CUDA engine under compute-sanitizer: a small run of it, held to the laws of the probe.

`python -m tarflow_fast.probe.sanitizer` is the small run. It is short, as the tools watch every access to memory.
"""

from __future__ import annotations

import itertools
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from ..engine.backend import Backend
from ..engine.shape import BlockShape
from ..engine.verdict import Size
from . import laws
from .job import EngineJob
from .processes import run_all
from .subject import Subject

SHAPES = {  # the width of a large model has few tokens
    "small": BlockShape(tokens=16, token_dim=4, channels=64, layers=2, heads=1, head_dim=64, hidden=256, classes=3),
    "wide": BlockShape(tokens=4, token_dim=192, channels=768, layers=1, heads=12, head_dim=64, hidden=3072, classes=3),
}
BATCHES = (2, 32)
"""The numbers of samples, which are guided: one tile of 8 rows, and as many as a launch takes."""
LAWS = ("same bits again", "converge")
COMMAND = (sys.executable, "-m", "tarflow_fast.probe.sanitizer")
TOOLKIT = "/usr/local/cuda"
"""Where the CUDA toolkit is unless CUDA_HOME says otherwise."""
PLAIN = "plain"
"""The name of the small run by itself."""
TOOLS = ("memcheck", "racecheck")
FOUND = 86
"""The exit code of a tool that has found something; a run that fails by itself has another."""


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
    for name, done in run_all(commands, seconds, Path(__file__).resolve().parents[2]).items():
        outcome = {0: "ok", FOUND: "findings", None: "stopped"}.get(done.code, "failed")
        tail = None if outcome == "ok" else done.tail
        runs.append({"name": name, "outcome": outcome, "seconds": done.seconds, "tail": tail})
    reason = "compute-sanitizer not found" if sanitizer is None else None
    return {"ok": all(run["outcome"] == "ok" for run in runs), "reason": reason, "runs": runs}


@torch.no_grad()
def small_run(device: torch.device, backend: Backend | str = "cuda") -> None:
    """Holds all of the kernel's modes to LAWS, for few and many rows. Raises RuntimeError if one is broken."""
    for (name, shape), dtype, batch in itertools.product(SHAPES.items(), (torch.float32, torch.bfloat16), BATCHES):
        job = EngineJob(backend, "torch", device, dtype, "highest", (shape,), Size(batch, True), repeats=2)
        subject = Subject(job, shape)
        for law in LAWS:
            fault = laws.check(subject, laws.Case(law, shape, job.size)).fault
            if fault is not None:
                raise RuntimeError(f"{name}, {dtype}, batch {batch}: {law}: {fault}")


if __name__ == "__main__":
    small_run(torch.device("cuda"))
