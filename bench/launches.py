"""What a launch costs that does nothing but wait for the one before it: the least that a step of a chain can take."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from tarflow_fast.kernels.launch import dependent_launch, launch_dependents, wait

from .timing import alternate, spread, timer_of

LAUNCHES = 200  # in one graph


@triton.jit
def _empty_kernel(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    if PDL:
        launch_dependents()
        wait()


def _chain(pdl: bool) -> None:
    options = {"enable_fp_fusion": True, **({"launch_pdl": True} if pdl else {})}
    for _ in range(LAUNCHES):
        _empty_kernel[(1,)](PDL=pdl, num_warps=1, **options)


def graph_of(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """run, captured; it is run once before, which compiles what has to be."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def measure_launches(device: torch.device, *, repeat: int, seconds: float) -> list[dict[str, Any]]:
    """Seconds of one empty dependent launch: in a CUDA graph without and, where there is such a thing, with PDL.

    Without a GPU the launches are the interpreter's, without a graph.
    """
    chains: dict[str, Callable[[], object]] = {}
    if device.type != "cuda":
        chains["interpreter"] = functools.partial(_chain, False)
    else:
        for name, pdl in (("graph", False), ("graph + PDL", True))[: 1 + dependent_launch(device)]:
            chains[name] = graph_of(functools.partial(_chain, pdl)).replay
    for run in chains.values():
        run()
    found = alternate(chains, repeat=repeat, budget=seconds, timer=timer_of(device))
    each = {name: [sample / LAUNCHES for sample in samples] for name, samples in found.items()}
    return [{"name": name, "seconds": samples, **spread(samples)} for name, samples in each.items()]
