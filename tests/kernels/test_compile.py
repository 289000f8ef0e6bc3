"""What the kernels compile to, for which no GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from cases import ROOT


def compile_all(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "bench", "kernels", *arguments]
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, cwd=ROOT, env={**inherited, **environment}, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "90", "100"])
def test_kernels_compile_for_every_architecture_without_spills(architecture: str) -> None:
    done = compile_all("--only", "triton", "--arch", architecture)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    names = "norm_linear cached_attention affine_step fixed_point_update affine_density affine_density_backward "
    names += "spline spline_backward affine_coupling affine_coupling_backward masked_inverse"
    kernels = {f"{name}_kernel" for name in names.split()}
    assert {row[0] for row in rows} >= kernels
    assert {row[1] for row in rows} == {architecture}
    assert all(int(row[3]) == 0 for row in rows)


@pytest.mark.slow
def test_the_interpreter_compiles_nothing() -> None:
    done = compile_all(TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert "TRITON_INTERPRET is set" in done.stderr
