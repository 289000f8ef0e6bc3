"""The tests that run on a GPU where there is one: `python tests/on_gpu.py SECONDS`, which prints JSON."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from tarflow_fast.probe.processes import run_all

KERNELS = ("norm_linear", "cached_attention", "affine_step", "affine_density", "affine_coupling", "fixed_point_update")
TRITON, CUDA = ("engine", "workspace", "graph", "plan"), ("engine", "same_bits", "refusals", "frontier")
FILES = (
    *("tests/engine/test_contract.py", "tests/engine/test_windows.py", "tests/backend/test_images.py"),
    "tests/backend/pytorch/test_compile.py",
    *(f"tests/kernels/test_{name}.py" for name in KERNELS),
    *(f"tests/backend/triton/test_{name}.py" for name in TRITON),
    *(f"tests/backend/cuda/test_{name}.py" for name in CUDA),
)
PYTEST = (sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist")


def run_tests(seconds: float) -> dict[str, Any]:
    """Returns {passed, failed, seconds, ok, tail} of pytest over FILES, a process for each file, all at once: most of
    the time kernels are being compiled. They are stopped after `seconds`, which is no success.

    failed: tests that failed or could not be set up. tail: the last lines of each file's run that went wrong, or None.
    """
    done = run_all({file: (*PYTEST, file) for file in FILES}, seconds, Path(__file__).resolve().parent.parent).values()
    counts = {"passed": 0, "failed": 0, "error": 0}
    for number, word in re.findall(r"(\d+) (passed|failed|error)", "".join(run.output for run in done)):
        counts[word] += int(number)
    # pytest ends with 5 where a file is skipped as a whole, as of an engine that was not built
    wrong = [run for run in done if run.code != 0 and not (run.code == 5 and " skipped" in run.output)]
    tail = [line for run in wrong for line in run.tail]
    found: dict[str, Any] = {"passed": counts["passed"], "failed": counts["failed"] + counts["error"]}
    return {**found, "seconds": max(run.seconds for run in done), "ok": not tail, "tail": tail or None}


if __name__ == "__main__":
    print(json.dumps(run_tests(float(sys.argv[1]))))
