"""The tests of what runs on the GPU, run on this machine before anything is timed."""

from __future__ import annotations

import re
import subprocess
import sys
import time
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
)
"""Those whose tests use `cases.KERNEL_DEVICE`."""
TAIL = 20  # lines of pytest's output that the record keeps of a run that failed


def run_tests(seconds: float) -> dict[str, Any]:
    """{passed, failed, seconds, ok, tail} of one pytest over FILES; it is stopped after `seconds`, which is no success.

    failed: tests that failed or could not be set up. tail: the last lines that pytest wrote, None if all is well.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *FILES]
    started = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds
        )
        ok, output = done.returncode == 0, done.stdout
    except subprocess.TimeoutExpired as error:
        ok = False
        output = (error.stdout or b"").decode(errors="replace") + f"\nstopped after {seconds:.0f} s"
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", output)}
    return {
        "passed": counts.get("passed", 0),
        "failed": counts.get("failed", 0) + counts.get("error", 0),
        "seconds": time.monotonic() - started,
        "ok": ok,
        "tail": None if ok else output.replace(f"{ROOT}/", "").splitlines()[-TAIL:],
    }
