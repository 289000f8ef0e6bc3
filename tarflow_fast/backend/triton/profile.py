"""What can be timed inside the Triton engine: an empty launch, and an operation whose operands lie in memory.

Each function returns what is to be run, by name; who calls it holds the clock.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ...kernels.launch import dependent_launch, launch_dependents, wait
from .graph import capture

Runs = Mapping[str, Callable[[], object]]
LAUNCHES = 200
"""The number of empty launches in one graph."""
OPERATIONS = 64
"""The least number of launches of one operation in a graph."""


@triton.jit
def _empty_kernel(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    if PDL:
        launch_dependents()
        wait()


def _chain(pdl: bool) -> None:
    options: dict[str, Any] = {"enable_fp_fusion": True, **({"launch_pdl": True} if pdl else {})}
    for _ in range(LAUNCHES):
        _empty_kernel[(1,)](PDL=pdl, num_warps=1, **options)


def _graph_of(*runs: Callable[[], object]) -> Callable[[], None]:
    """Returns what replays a CUDA graph of the runs, which are done once before: that compiles what has to be."""

    def one_by_one() -> None:
        for run in runs:
            run()

    one_by_one()
    return capture(one_by_one).replay


def empty_launches(device: torch.device) -> Runs:
    """Returns chains of `LAUNCHES` launches that do nothing but wait for the one before, the least that a step of a
    chain can take: in a CUDA graph without and, where there is such a thing, with PDL; or else in the interpreter."""
    if device.type != "cuda":
        return {"interpreter": functools.partial(_chain, False)}
    chains = {"graph": False, **({"graph + PDL": True} if dependent_launch(device) else {})}
    return {name: _graph_of(functools.partial(_chain, pdl)) for name, pdl in chains.items()}


def cold_launches(group: Sequence[Callable[[], object]], device: torch.device) -> tuple[Runs, int]:
    """Returns "both", launches of an operation whose weights and cache lie in memory, and "sweeps", what is to be taken
    off its time, on a CPU nothing; and the number of launches.

    The layers in turn are not enough for that: the qkv weights of eight layers fit in an H200's L2 cache. So each
    launch comes after a read of twice as much as that holds.
    """
    if device.type != "cuda":
        return {"both": lambda: [run() for run in group]}, len(group)
    rows = 2 * torch.cuda.get_device_properties(device).L2_cache_size // 4096
    matrix, sums = torch.ones(rows, 1024, device=device), torch.empty(rows, device=device)
    runs = list(group) * math.ceil(OPERATIONS / len(group))

    def sweep() -> None:
        torch.sum(matrix, dim=1, out=sums)

    both = _graph_of(*(step for run in runs for step in (sweep, run)))
    return {"both": both, "sweeps": _graph_of(*[sweep] * len(runs))}, len(runs)
