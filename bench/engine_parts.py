"""Inside an engine that is made of kernels: the time of each, launches per token, and a step with and without PDL.

An engine offers itself for this by two members: `launches_per_token`, a number, and `operations(state)`, a list of
(name, run, bytes): `run` launches that operation once, on the current stream, at a late position, with the engine's own
buffers; `bytes` is what it has to move. An operation of several layers is listed once for each, under one name.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tarflow_fast.engine import BlockEngine, Condition, Guidance
from tarflow_fast.kernels.launch import dependent_launch

from .gpu_cells import BACKEND, DTYPE, GpuCell, Inputs
from .launches import graph_of
from .timing import alternate, spread, timer_of

Operation = tuple[str, Callable[[], object], int]
LAUNCHES = 64  # of one operation in a graph


def block_engine(inputs: Inputs, device: torch.device, **options: Any) -> BlockEngine:
    """BACKEND's engine of the only block; by the rule that NAME's is class NameEngine in engine/NAME_engine.py."""
    module = importlib.import_module(f"tarflow_fast.engine.{BACKEND}_engine")
    weights = inputs.model.block_weights(0)
    engine: BlockEngine = getattr(module, f"{BACKEND.title()}Engine")(weights, device=device, dtype=DTYPE, **options)
    return engine


def _sweep(device: torch.device) -> Callable[[], object]:
    """Reads twice as much as the L2 cache holds, so that what is read next comes from memory."""
    rows = 2 * torch.cuda.get_device_properties(device).L2_cache_size // 4096
    matrix, sums = torch.ones(rows, 1024, device=device), torch.empty(rows, device=device)
    return lambda: torch.sum(matrix, dim=1, out=sums)


def operation_samples(
    group: Sequence[Callable[[], object]], device: torch.device, *, repeat: int, seconds: float
) -> list[float]:
    """Seconds of one launch of an operation whose weights and cache lie in memory.

    The layers in turn are not enough for that: the qkv weights of eight layers fit in an H200's L2 cache. So each
    launch comes after a sweep through that cache, in one CUDA graph, and a graph of as many sweeps alone is taken off.
    Without a GPU: of a call.
    """
    timer = timer_of(device)
    if device.type != "cuda":
        for run in group:
            run()
        found = alternate({"all": lambda: [run() for run in group]}, repeat=repeat, budget=seconds, timer=timer)
        return [sample / len(group) for sample in found["all"]]
    sweep = _sweep(device)
    rounds = math.ceil(LAUNCHES / len(group))

    def with_sweeps() -> None:
        for run in list(group) * rounds:
            sweep()
            run()

    def sweeps() -> None:
        for _ in range(rounds * len(group)):
            sweep()

    graphs = {"both": graph_of(with_sweeps), "sweeps": graph_of(sweeps)}
    for graph in graphs.values():
        graph.replay()
    replays = {name: graph.replay for name, graph in graphs.items()}
    found = alternate(replays, repeat=repeat, budget=seconds, timer=timer)
    return [(a - b) / (rounds * len(group)) for a, b in zip(found["both"], found["sweeps"], strict=True)]


def measure_operations(
    operations: Sequence[Operation], device: torch.device, *, repeat: int, seconds: float
) -> list[dict[str, Any]]:
    """One entry for each name: times of one launch, and "bytes" and "bytes_per_second" of its mean traffic."""
    groups: dict[str, list[Operation]] = {}
    for operation in operations:
        groups.setdefault(operation[0], []).append(operation)
    entries = []
    for name, group in groups.items():
        samples = operation_samples([run for _, run, _ in group], device, repeat=repeat, seconds=seconds / len(groups))
        entry: dict[str, Any] = {"name": name, "seconds": samples, **spread(samples)}
        entry["bytes"] = sum(moved for _, _, moved in group) / len(group)
        entry["bytes_per_second"] = entry["bytes"] / entry["median"]
        entries.append(entry)
    return entries


def measure_engine(
    cell: GpuCell,
    inputs: Inputs,
    device: torch.device,
    exact: Tensor,
    *,
    tolerance: float,
    repeat: int,
    seconds: float,
) -> dict[str, Any] | None:
    """A sampling cell's "engine", or None where the engine does not offer itself: see above.

    "steps": seconds of a step, a block's pass over T − 1, for PDL on and off where the device has it; of engines whose
    images were within the tolerance first. "failed": those that were not.
    """
    plain = block_engine(inputs, device)
    if not hasattr(plain, "operations"):
        return None
    condition = Condition(inputs.y, Guidance(cell.guidance))
    state = plain.begin(inputs.z, condition)
    plain.reverse(state)
    found: dict[str, Any] = {
        "launches_per_token": plain.launches_per_token,  # type: ignore[attr-defined]
        "operations": measure_operations(plain.operations(state), device, repeat=repeat, seconds=seconds / 2),
        "bytes_per_step": cell.work.bytes / (cell.sizes.num_patches - 1),
        "steps": [],
        "failed": [],
    }
    choices = {"PDL": True, "no PDL": False} if dependent_launch(device) else {"no PDL": False}
    passes: dict[str, Callable[[], object]] = {}
    for name, pdl in choices.items():
        engine = block_engine(inputs, device, pdl=pdl)
        state = engine.begin(inputs.z, condition)
        engine.reverse(state)
        error = float((inputs.model.unpatchify(state.x) - exact).abs().max())
        if error <= tolerance:  # not so for NaN
            passes[name] = functools.partial(engine.reverse, state)
        else:
            found["failed"].append(f"{name}: differs by {error:.1e}, more than {tolerance:.1e}")
    samples = alternate(passes, repeat=repeat, budget=seconds / 2, timer=timer_of(device)) if passes else {}
    for name, blocks in samples.items():
        steps = [sample / (cell.sizes.num_patches - 1) for sample in blocks]
        found["steps"].append({"name": name, "seconds": steps, **spread(steps)})
    return found
