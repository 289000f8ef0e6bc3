"""What csrc/cuda/device.cuh refuses to compile, and what it compiles to. nvcc is enough for that."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[3] / "csrc" / "cuda"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
KERNEL = """
#include "pair.cuh"
using namespace tarflow;
extern "C" __global__ void kernel(const __grid_constant__ Params p) { %s }
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NVCC is None, reason="there is no nvcc"),
]


def compiled(body: str, folder: Path, architecture: str = "80") -> str:
    """The PTX of a kernel. Raises RuntimeError with what nvcc says."""
    source = folder / "kernel.cu"
    source.write_text(KERNEL % body, encoding="utf-8")
    command = [str(NVCC), "-std=c++17", f"-arch=sm_{architecture}", "-ptx", f"-I{SOURCES}"]
    command += [str(source), "-o", str(folder / "ptx")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return (folder / "ptx").read_text(encoding="utf-8")


@pytest.mark.parametrize("type", ["bf16", "fp16"])
def test_a_half_is_not_read_by_a_load_that_may_be_moved_across_a_barrier(type: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="static assertion failed"):
        compiled(f"store(Global<{type}>(p.hidden), 0, load(Global<{type}>(p.hidden), 1));", tmp_path)
    ptx = compiled(f"store(Global<{type}>(p.hidden), 0, load_vector<1>(Global<{type}>(p.hidden), 1).at[0]);", tmp_path)
    assert "ld.global.cg.u16" in ptx


def test_a_wait_has_an_end(tmp_path: Path) -> None:
    """It looks at the clock now and then, and ends the launch after two seconds."""
    ptx = compiled("await(Global<unsigned>(p.barrier), 1);", tmp_path)
    assert ptx.count("ld.acquire.gpu.global.u32") >= 1
    assert "%globaltimer" in ptx
    assert re.search(r"setp\S+ .*, 200000000[01];", ptx)
    assert "trap;" in ptx


def test_a_wait_at_a_gate_has_an_end(tmp_path: Path) -> None:
    """After 2²⁷ looks, as a clock would take registers."""
    ptx = compiled("pass_gate(shared<Gate>(0, 1), 0, p.mode);", tmp_path, "90a")
    assert "mbarrier.test_wait.parity" in ptx
    assert re.search(r"setp\S+ .*, 13421772[78];", ptx)
    assert "trap;" in ptx


@pytest.mark.parametrize(
    ("architecture", "gates"), [("80", 0), ("89", 0), ("90", 1), ("90a", 1), ("100", 1), ("103", 1), ("120", 0)]
)
def test_which_devices_have_gates(architecture: str, gates: int, tmp_path: Path) -> None:
    """Ampere and Ada have none, and on 12.x copies to several blocks are not said to be quick."""
    ptx = compiled(f"static_assert(GATES == {gates}); store(Global<int>(p.reached), 0, 1);", tmp_path, architecture)
    assert "st.global" in ptx
