"""A kernel as it was compiled for one architecture, held to that architecture's limits and to the rules of `lint.py`.

`cuobjdump`, which comes with Triton, reads it.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from . import lint

Of = TypeVar("Of")
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""The bytes of shared memory that one program can have, by architecture."""
REGISTERS = 65536
"""The registers of a multiprocessor."""


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel.

    registers: those of a thread. stack: the bytes of a thread's stack for registers that are spilled. shared: the bytes
    of shared memory for one program of so many warps. findings: what it breaks of the rules.
    """

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
        """Returns what is wrong with it, or None."""
        if self.stack > 0:
            return f"spills {self.stack} bytes"
        registers = -(-self.registers // 8) * 8 * 32 * self.warps  # a thread is given eight at a time
        if registers > REGISTERS:
            return f"wants {registers} registers, there are {REGISTERS}"
        if self.shared > SHARED_LIMIT[self.architecture]:
            return f"wants {self.shared} bytes of shared memory, there are {SHARED_LIMIT[self.architecture]}"
        return "; ".join(self.findings) or None


def cuobjdump(option: str, path: str) -> str:
    """Returns what `cuobjdump` prints of a compiled file with this option."""
    import triton

    command = [triton.knobs.nvidia.cuobjdump.path, option, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resource_usage(path: str) -> str:
    """Returns the registers, stack and shared memory of each kernel of a compiled file, as `cuobjdump` prints them."""
    return cuobjdump("--dump-resource-usage", path)


def cuda_findings(path: str) -> dict[tuple[int, str], tuple[str, ...]]:
    """Returns the findings about the CUDA engine's kernels, by their architecture and mangled name.

    path: the compiled module. Its PTX, that of one architecture, is looked at too.
    """
    found: dict[tuple[int, str], list[str]] = defaultdict(list)
    for architecture, name, code in lint.functions(cuobjdump("-sass", path)):
        found[architecture, name] += _broken(lint.CUDA_SASS, code)
    ptx = cuobjdump("-ptx", path)
    target = re.search(r"^\.target\s+sm_(\d+)", ptx, re.MULTILINE)
    for name, statements in lint.entries(ptx):
        found[int(target[1]) if target else 0, name] += _broken(lint.CUDA_PTX, statements)
    return {key: tuple(findings) for key, findings in found.items()}


def triton_findings(cubin: str, ptx: str, dependent: bool) -> tuple[str, ...]:
    """Returns the findings about a Triton kernel.

    cubin: the path of its machine code. dependent: whether it is a dependent launch (PDL).
    """
    rules = {**lint.TRITON_SASS, **(lint.DEPENDENT if dependent else {})}
    in_sass = [each for _, _, code in lint.functions(cuobjdump("-sass", cubin)) for each in _broken(rules, code)]
    in_ptx = [each for _, statements in lint.entries(ptx) for each in _broken(lint.TRITON_PTX, statements)]
    return (*in_sass, *in_ptx)


def _broken(rules: Mapping[str, lint.Rule[Of]], code: Of) -> Iterator[str]:
    for name, rule in rules.items():
        findings = rule(code)
        if findings:
            more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
            yield f"{name}: {findings[0]}{more}"
