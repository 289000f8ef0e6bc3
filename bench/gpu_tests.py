"""The tests of what runs on the GPU, run on this machine before anything is timed."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .machine import ROOT

FILES = (
    "tests/test_engine.py",
    "tests/test_norm_linear.py",
    "tests/test_cached_attention.py",
    "tests/test_affine_step.py",
    "tests/test_affine_density.py",
    "tests/test_fixed_point_update.py",
    "tests/test_triton_engine.py",
    "tests/test_cuda_engine.py",
)
"""Those whose tests use `cases.KERNEL_DEVICE`."""
TAIL = 20  # lines of the output that the record keeps of a file that failed


def run_tests(seconds: float) -> dict[str, Any]:
    """{passed, failed, seconds, ok, tail} of pytest over FILES, a process for each file, all at once: most of the time
    kernels are being compiled. They are stopped after `seconds`, which is no success.

    failed: tests that failed or could not be set up. tail: the last lines of each file's run that went wrong, None if
    all is well.
    """
    started = time.monotonic()
    with ThreadPoolExecutor(len(FILES)) as pool:
        runs = list(pool.map(lambda file: _run_file(file, seconds), FILES))
    passed = sum(counts.get("passed", 0) for counts, _ in runs)
    failed = sum(counts.get("failed", 0) + counts.get("error", 0) for counts, _ in runs)
    tails = [line for _, tail in runs for line in tail]
    return {
        "passed": passed,
        "failed": failed,
        "seconds": time.monotonic() - started,
        "ok": not tails,
        "tail": tails or None,
    }


def _run_file(file: str, seconds: float) -> tuple[dict[str, int], list[str]]:
    """Counts by outcome, and the end of the output unless all went well."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist", file]
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds
        )
        output = done.stdout
        skipped = done.returncode == 5 and " skipped" in output  # all of the file, as of an engine that was not built
        ok = done.returncode == 0 or skipped
    except subprocess.TimeoutExpired as error:
        ok = False
        output = (error.stdout or b"").decode(errors="replace") + f"\nstopped after {seconds:.0f} s"
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", output)}
    return counts, [] if ok else output.replace(f"{ROOT}/", "").splitlines()[-TAIL:]
