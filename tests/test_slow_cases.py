"""The list of slow cases names cases that there are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SLOW_CASES


@pytest.mark.slow
def test_each_slow_case_is_a_case() -> None:
    """Else one that was renamed would run with the fast ones again. Files are left out that need a library."""
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0", "-o", "addopts=", "-m", ""]
    done = subprocess.run(
        [*command, "--import-mode=importlib", "tests"], cwd=root, capture_output=True, text=True, check=True
    )
    found = done.stdout.splitlines()
    files = {case.split("::")[0] for case in found}
    listed = SLOW_CASES.read_text(encoding="utf-8").splitlines()
    assert listed == sorted(set(listed))
    assert [case for case in listed if case.split("::")[0] in files and case not in found] == []
