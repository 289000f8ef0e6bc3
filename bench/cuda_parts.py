"""Inside the CUDA engine: a step, what each phase of it takes, and what is left without any: barriers and weights.

The kernel is one launch, so a phase is measured by leaving it out: the launch's size `left_out` has a bit for each
(`Phase` in csrc/cuda/params.h). Its weights are fetched all the same, so what is saved is the phase's own work and what
of the fetching it does not hide. A pass that leaves something out computes garbage, and no element of it is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tarflow_fast.backend.cuda.engine import CudaEngine
from tarflow_fast.backend.cuda.plan import MOST_ROWS
from tarflow_fast.engine import Condition, Guidance

from .gpu_cells import DTYPE, GpuCell, Inputs
from .timing import alternate, spread, timer_of

PHASES = ("embed", "qkv", "attention", "proj", "fc1", "fc2", "proj_out")  # bits of left_out, the lowest first
ALL = 2 ** len(PHASES) - 1


def measure_cuda(
    cell: GpuCell,
    inputs: Inputs,
    device: torch.device,
    exact: Tensor,
    *,
    tolerance: float,
    repeat: int,
    seconds: float,
) -> dict[str, Any]:
    """A sampling cell's "cuda". A step is a block's pass over T − 1.

    "launches_per_pass": of at most 64 rows each; "barriers_per_token": 5 L + 2 of each of them. "step": seconds, with
    their spread, of the whole step; "phases": [{name, …}], seconds that a step is shorter by without that phase, round
    by round; "barriers": seconds of a step without any. "failed": why these three are missing, if the images of a whole
    pass were not within the tolerance first.
    """
    guidance = Guidance(cell.guidance)
    rows = (2 if guidance.active else 1) * cell.batch
    launches = math.ceil(rows / MOST_ROWS)
    weights = inputs.model.block_weights(0)
    engine = CudaEngine(weights, device=device, dtype=DTYPE)
    state = engine.begin(inputs.z, Condition(inputs.y, guidance))
    engine.reverse(state)
    found: dict[str, Any] = {
        "launches_per_pass": launches,
        "barriers_per_token": launches * (5 * cell.sizes.layers_per_block + 2),
        "bytes_per_step": cell.work.bytes / (cell.sizes.num_patches - 1),
        "failed": [],
    }
    error = float((inputs.model.unpatchify(state.x) - exact).abs().max())
    if not error <= tolerance:  # so for NaN
        found["failed"].append(f"cuda: differs by {error:.1e}, more than {tolerance:.1e}")
        return found

    def without(bits: int) -> Callable[[], None]:
        def run() -> None:
            state.cache.launch.set_size("left_out", bits)
            try:
                engine.reverse(state)
            finally:
                state.cache.launch.set_size("left_out", 0)  # else it stays for all later passes

        return run

    left_out = {"step": 0, **{name: 1 << bit for bit, name in enumerate(PHASES)}, "barriers": ALL}
    passes = {name: without(bits) for name, bits in left_out.items()}
    for run in passes.values():
        run()  # warm
    samples = alternate(passes, repeat=repeat, budget=seconds, timer=timer_of(device))
    steps = {name: [sample / (cell.sizes.num_patches - 1) for sample in block] for name, block in samples.items()}
    for name in ("step", "barriers"):
        found[name] = {"seconds": steps[name], **spread(steps[name])}
    saved = {name: [whole - rest for whole, rest in zip(steps["step"], steps[name], strict=True)] for name in PHASES}
    found["phases"] = [{"name": name, "seconds": each, **spread(each)} for name, each in saved.items()]
    return found
