"""What the CUDA engine's kernel was compiled to: registers, shared memory, spills, of each instance and architecture.

`cuobjdump` reads them from the module that setup.py has built.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from types import MappingProxyType

import torch

from tarflow_fast.backend.cuda.pack import linear_sizes
from tarflow_fast.backend.cuda.plan import fetches, grid_blocks, make_plan, share, slot_inputs

from .compiled import SHARED_LIMIT, SIZES, Compiled

DTYPES = {"f": torch.float32, "6__half": torch.float16, "13__nv_bfloat16": torch.bfloat16}  # as C++ mangles them
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
RESERVED = {80: 0, 90: 1024, 100: 1024}  # shared memory that cuobjdump counts, and SHARED_LIMIT does not


def module_path() -> str | None:
    """Returns where the compiled module is, or None where it was not built."""
    found = find_spec("tarflow_fast._cuda")
    return None if found is None else found.origin


Findings = Mapping[tuple[int, str], tuple[str, ...]]
NO_FINDINGS: Findings = MappingProxyType({})


def survey(usage: str, architectures: Collection[int], findings: Findings = NO_FINDINGS) -> Iterator[Compiled]:
    """Yields what each instance uses. usage: of the module, as cuobjdump prints it. findings: see
    `linted.cuda_findings`. Raises BackendError if a model's launch does not fit an architecture."""
    architecture, kernel = 0, ""
    for line in usage.splitlines():
        if found := re.match(r"arch = sm_(\d+)", line):
            architecture = int(found[1])
        elif found := re.match(r" Function (\w+):", line):
            kernel = found[1]
        elif "REG:" in line and architecture in architectures:
            row = _row(architecture, kernel, {name: int(n) for name, n in re.findall(r"\b([A-Z]+):(\d+)", line)})
            yield replace(row, findings=findings.get((architecture, kernel), ()))


def _row(architecture: int, kernel: str, used: dict[str, int]) -> Compiled:
    found = re.search(r"11pass_kernelI(\w+)Li(\d+)ELi(\d+)EE", kernel)
    if found is None or found[1] not in DTYPES:
        raise ValueError(f"expected instances of pass_kernel alone, got {kernel}")
    dtype, rows, warps = DTYPES[found[1]], 8 * int(found[2]), int(found[3])
    dynamic = max(dynamic_bytes(name, dtype, rows, warps, architecture) for name in SIZES)
    return Compiled(
        "cuda pass",
        architecture,
        f"{str(dtype).removeprefix('torch.')} rows={rows}",
        warps,
        used["REG"],
        used["STACK"] + used["LOCAL"],
        used["SHARED"] - RESERVED[architecture] + dynamic,
    )


def dynamic_bytes(model: str, dtype: torch.dtype, rows: int, warps: int, architecture: int) -> int:
    """Returns the bytes of shared memory that a launch of this instance asks for."""
    shape, limit = SIZES[model].block_shape, SHARED_LIMIT[architecture]
    sizes = {"rows": rows, "most_rows": rows, "warps": warps, "shared_bytes": limit, **_division(model, architecture)}
    return make_plan(shape, dtype, **sizes).shared_bytes


@cache
def _division(model: str, architecture: int) -> dict[str, int]:
    """Returns the most that a block fetches, the most tiles that it has, and how many blocks there are."""
    shape = SIZES[model].block_shape
    sizes, blocks = linear_sizes(shape), grid_blocks(shape, MULTIPROCESSORS[architecture])
    work = share(sizes, blocks)
    jobs = fetches(sizes, work, slot_inputs(shape)).shape[1]
    return {"jobs": jobs, "block_tiles": int(work[:, :, 1].sum(0).max()), "blocks": blocks}
