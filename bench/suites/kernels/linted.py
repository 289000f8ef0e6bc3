"""The rules of `lint.py` on kernels as they were compiled: the CUDA engine's module, and one Triton kernel."""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import TypeVar

from . import lint

Of = TypeVar("Of")
LATER: frozenset[str] = frozenset()
"""The rules that some of the CUDA engine's kernels still break. A rule that is taken out of here fails the bench."""


def dump(what: str, path: str) -> str:
    """Returns what `cuobjdump`, which comes with Triton, prints of a compiled file. what: "sass" or "ptx"."""
    import triton

    command = [triton.knobs.nvidia.cuobjdump.path, f"-{what}", path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def cuda_findings(path: str) -> dict[tuple[int, str], tuple[str, ...]]:
    """Returns the findings about the CUDA engine's kernels, by their architecture and mangled name.

    path: the compiled module. Its PTX, that of one architecture, is looked at too.
    """
    found: dict[tuple[int, str], list[str]] = defaultdict(list)
    for architecture, name, code in lint.functions(dump("sass", path)):
        found[architecture, name] += _broken(lint.CUDA_SASS, code)
    ptx = dump("ptx", path)
    target = re.search(r"^\.target\s+sm_(\d+)", ptx, re.MULTILINE)
    for name, statements in lint.entries(ptx):
        found[int(target[1]) if target else 0, name] += _broken(lint.CUDA_PTX, statements)
    return {key: tuple(findings) for key, findings in found.items()}


def triton_findings(cubin: str, ptx: str, dependent: bool) -> tuple[str, ...]:
    """Returns the findings about a Triton kernel.

    cubin: the path of its machine code. dependent: whether it is a dependent launch (PDL).
    """
    rules = {**lint.TRITON_SASS, **(lint.DEPENDENT if dependent else {})}
    in_sass = [each for _, _, code in lint.functions(dump("sass", cubin)) for each in _broken(rules, code)]
    in_ptx = [each for _, statements in lint.entries(ptx) for each in _broken(lint.TRITON_PTX, statements)]
    return (*in_sass, *in_ptx)


def _broken(rules: Mapping[str, lint.Rule[Of]], code: Of) -> Iterator[str]:
    for name, rule in rules.items():
        findings = rule(code)
        if findings:
            more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
            yield f"{name}: {findings[0]}{more}"


def faults(findings: tuple[str, ...]) -> list[str]:
    """Returns the findings that fail the bench: those of rules that are not kept for later."""
    return [each for each in findings if each.partition(":")[0] not in LATER]
