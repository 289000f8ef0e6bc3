"""A kernel as it was compiled for one architecture, and that architecture's limits."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

from ...common.models import MODELS
from .linted import faults

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes for one program, by architecture
REGISTERS = 65536  # of a multiprocessor
NAMES = ("afhq", "imagenet", "small", "wide heads", "volume-preserving")
SIZES = {name: MODELS[name] for name in NAMES}  # of the models whose kernels are looked at


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel uses registers of a thread, bytes of a stack for those spilled, and bytes of shared memory for
    one program of so many warps. findings: those of `lint.py`."""

    kernel: str
    architecture: int
    tile: str
    warps: int
    registers: int
    stack: int
    shared: int
    findings: tuple[str, ...] = ()

    @property
    def fault(self) -> str | None:
        if self.stack > 0:
            return f"spills {self.stack} bytes"
        registers = -(-self.registers // 8) * 8 * 32 * self.warps  # a thread is given eight at a time
        if registers > REGISTERS:
            return f"wants {registers} registers, there are {REGISTERS}"
        if self.shared > SHARED_LIMIT[self.architecture]:
            return f"wants {self.shared} bytes of shared memory, there are {SHARED_LIMIT[self.architecture]}"
        return next(iter(faults(self.findings)), None)


def resource_usage(path: str) -> str:
    """Returns what `cuobjdump`, which comes with Triton, says of a compiled file."""
    import triton

    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
