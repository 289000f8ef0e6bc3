"""What the CUDA engine's kernel was compiled to: registers, shared memory, spills, of each instance and architecture.

`cuobjdump` reads them from the module that setup.py has built. No GPU is needed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from types import MappingProxyType

import torch

from ...engine.shape import BlockShape
from ...machine_code import SHARED_LIMIT, Compiled, cuda_findings, resource_usage
from .plan import GROUP_ROWS, MOST_ROWS, grid_blocks, make_division, make_plan

DTYPES = {"f": torch.float32, "6__half": torch.float16, "13__nv_bfloat16": torch.bfloat16}  # as C++ mangles them
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
RESERVED = {80: 0, 90: 1024, 100: 1024}  # shared memory that cuobjdump counts, and SHARED_LIMIT does not
Findings = Mapping[tuple[int, str], tuple[str, ...]]
NO_FINDINGS: Findings = MappingProxyType({})


def module_path() -> str | None:
    """Returns where the compiled module is, or None where it was not built."""
    found = find_spec("tarflow_fast._cuda")
    return None if found is None else found.origin


def survey(path: str, architectures: Collection[int], shapes: Sequence[BlockShape]) -> Iterator[Compiled]:
    """Yields what each instance of the kernel uses, with the shared memory that the most demanding of the shapes wants.

    path: the compiled module. Raises BackendError if a launch for one of the shapes does not fit an architecture.
    """
    return rows(resource_usage(path), architectures, shapes, cuda_findings(path))


def rows(
    usage: str, architectures: Collection[int], shapes: Sequence[BlockShape], findings: Findings = NO_FINDINGS
) -> Iterator[Compiled]:
    """Yields what `survey` does. usage: of the module, as cuobjdump prints it. findings: see `cuda_findings`."""
    architecture, kernel = 0, ""
    for line in usage.splitlines():
        if found := re.match(r"arch = sm_(\d+)", line):
            architecture = int(found[1])
        elif found := re.match(r" Function (\w+):", line):
            kernel = found[1]
        elif "REG:" in line and architecture in architectures:
            used = {name: int(n) for name, n in re.findall(r"\b([A-Z]+):(\d+)", line)}
            row = _row(architecture, kernel, used, shapes)
            yield replace(row, findings=findings.get((architecture, kernel), ()))


def _row(architecture: int, kernel: str, used: dict[str, int], shapes: Sequence[BlockShape]) -> Compiled:
    found = re.search(r"11pass_kernelI(\w+)Li(\d+)ELi(\d+)EE", kernel)
    if found is None or found[1] not in DTYPES:
        raise ValueError(f"expected instances of pass_kernel alone, got {kernel}")
    dtype, n_tiles, warps = DTYPES[found[1]], int(found[2]), int(found[3])
    tokens = MOST_ROWS if 8 * n_tiles == GROUP_ROWS else 8 * n_tiles
    dynamic = max(dynamic_bytes(shape, dtype, tokens, warps, architecture) for shape in shapes)
    return Compiled(
        "cuda pass",
        architecture,
        f"{str(dtype).removeprefix('torch.')} rows={tokens}",
        warps,
        used["REG"],
        used["STACK"] + used["LOCAL"],
        used["SHARED"] - RESERVED[architecture] + dynamic,
    )


def dynamic_bytes(shape: BlockShape, dtype: torch.dtype, rows: int, warps: int, architecture: int) -> int:
    """Returns the bytes of shared memory that a launch of this instance asks for."""
    sizes = {"rows": rows, "most_rows": rows, "warps": warps, "shared_bytes": SHARED_LIMIT[architecture]}
    return make_plan(shape, dtype, **sizes, **_division(shape, rows, architecture)).shared_bytes


@cache
def _division(shape: BlockShape, rows: int, architecture: int) -> dict[str, int]:
    """Returns the most that a block fetches, the most tiles that it has, and how many blocks there are."""
    blocks = grid_blocks(shape, MULTIPROCESSORS[architecture])
    division = make_division(shape, rows, blocks, torch.device("cpu"))
    return {"jobs": division.jobs.shape[1], "block_tiles": division.most_tiles, "blocks": division.blocks}
