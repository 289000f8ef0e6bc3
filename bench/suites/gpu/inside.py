"""Inside the engines for GPUs: what a launch costs, each kernel of the Triton engine, each phase of the CUDA engine's.

Triton is there on Linux only, and is imported with this file.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tarflow_fast.backend.cuda.engine import CudaEngine
from tarflow_fast.backend.triton.engine import TritonEngine
from tarflow_fast.engine import Condition, Guidance
from tarflow_fast.kernels.launch import dependent_launch, launch_dependents, wait

from ...common.harness import Rounds, beyond, timed
from .cases import DTYPE, Case, Inputs

PHASES = ("embed", "qkv", "attention", "proj", "fc1", "fc2", "proj_out")  # `Phase` in csrc/cuda/params.h, in its order
ALL = 2 ** len(PHASES) - 1
LAUNCHES = 200  # of the empty kernel in one graph
OPERATIONS = 64  # launches of one operation in a graph
Operation = tuple[str, Callable[[], object], int]


@triton.jit
def _empty_kernel(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    if PDL:
        launch_dependents()
        wait()


def _chain(pdl: bool) -> None:
    options = {"enable_fp_fusion": True, **({"launch_pdl": True} if pdl else {})}
    for _ in range(LAUNCHES):
        _empty_kernel[(1,)](PDL=pdl, num_warps=1, **options)


def graph_of(*runs: Callable[[], object]) -> Callable[[], None]:
    """Returns what replays a CUDA graph of the runs, which are done once before: that compiles what has to be."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for run in runs:
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    replay: Callable[[], None] = graph.replay
    return replay


def _each(name: str, samples: Sequence[float], of: int, **more: Any) -> dict[str, Any]:
    """Returns the times of one of so many that a sample is of."""
    each: dict[str, Any] = timed(name, [sample / of for sample in samples], **more)
    return each


def measure_launches(rounds: Rounds) -> list[dict[str, Any]]:
    """Returns the seconds of one launch that does nothing but wait for the one before it, the least that a step of a
    chain can take: in a CUDA graph without and, where there is such a thing, with PDL; or else in the interpreter."""
    chains: dict[str, Callable[[], object]] = {"interpreter": functools.partial(_chain, False)}
    if rounds.device.type == "cuda":
        chains = {"graph": graph_of(chains["interpreter"])}
        if dependent_launch(rounds.device):
            chains["graph + PDL"] = graph_of(functools.partial(_chain, True))
    return [_each(name, samples, LAUNCHES) for name, samples in rounds.warm(chains).items()]


def _sweep(device: torch.device) -> Callable[[], object]:
    """Returns what reads twice as much as the L2 cache holds, so that what is read next comes from memory."""
    rows = 2 * torch.cuda.get_device_properties(device).L2_cache_size // 4096
    matrix, sums = torch.ones(rows, 1024, device=device), torch.empty(rows, device=device)
    return lambda: torch.sum(matrix, dim=1, out=sums)


def operation_samples(group: Sequence[Callable[[], object]], rounds: Rounds) -> list[float]:
    """Returns the seconds of one launch of an operation whose weights and cache lie in memory, or of a call on a CPU.

    The layers in turn are not enough for that: the qkv weights of eight layers fit in an H200's L2 cache. So each
    launch comes after a sweep through that cache, in one CUDA graph, and a graph of as many sweeps alone is taken off.
    """
    if rounds.device.type != "cuda":
        return [sample / len(group) for sample in rounds.warm({"all": lambda: [run() for run in group]})["all"]]
    sweep, runs = _sweep(rounds.device), list(group) * math.ceil(OPERATIONS / len(group))
    both = graph_of(*(step for run in runs for step in (sweep, run)))
    found = rounds.warm({"both": both, "sweeps": graph_of(*[sweep] * len(runs))})
    return [(a - b) / len(runs) for a, b in zip(found["both"], found["sweeps"], strict=True)]


def measure_operations(operations: Sequence[Operation], rounds: Rounds) -> list[dict[str, Any]]:
    """Returns an entry for each name: times of one launch, and "bytes" and "bytes_per_second" of its mean traffic."""
    groups: dict[str, list[Operation]] = {}
    for operation in operations:
        groups.setdefault(operation[0], []).append(operation)
    entries = []
    for name, group in groups.items():
        samples = operation_samples([run for _, run, _ in group], rounds.share(1 / len(groups)))
        entry = timed(name, samples, bytes=sum(moved for _, _, moved in group) / len(group))
        entries.append({**entry, "bytes_per_second": entry["bytes"] / entry["median"]})
    return entries


def block_engine(inputs: Inputs, device: torch.device, **options: Any) -> Any:
    """Returns the Triton engine of the model's only block."""
    return TritonEngine(inputs.model.block_weights(0), device=device, dtype=DTYPE, **options)


def _reversed(engine: Any, case: Case, inputs: Inputs) -> Any:
    """Returns the state after a whole pass."""
    state = engine.begin(inputs.z, Condition(inputs.y, Guidance(case.guidance)))
    engine.reverse(state)
    return state


def _wrong(name: str, x: Tensor, inputs: Inputs, exact: Tensor, tolerance: float) -> list[str]:
    """Returns what is wrong with an engine's images, or nothing."""
    reason = beyond(float((inputs.model.unpatchify(x) - exact).abs().max()), tolerance)
    return [] if reason is None else [f"{name}: {reason}"]


def measure_engine(
    case: Case, inputs: Inputs, exact: Tensor, tolerance: float, rounds: Rounds
) -> dict[str, Any] | None:
    """Returns a sampling cell's "engine": the time of each kernel, launches per token, and a step with and without PDL.

    The engine offers itself for this by two members, and without these there is None: `launches_per_token`, a number,
    and `operations(state)`, a list of (name, run, bytes): `run` launches that operation once, on the current stream, at
    a late position, with the engine's own buffers; `bytes` is what it has to move. An operation of several layers is
    listed once for each, under one name. "steps": seconds of a step, a block's pass over T − 1, for PDL on and off
    where the device has it; of engines whose images were within the tolerance first. "failed": those that were not.
    """
    engine, tokens = block_engine(inputs, rounds.device), case.sizes.num_patches - 1
    if not hasattr(engine, "operations"):
        return None
    operations = engine.operations(_reversed(engine, case, inputs))
    found: dict[str, Any] = {
        "launches_per_token": engine.launches_per_token,
        "operations": measure_operations(operations, rounds.share(0.5)),
        "bytes_per_step": case.work.bytes / tokens,
        "failed": [],
    }
    passes: dict[str, Callable[[], object]] = {}
    for name, pdl in (("PDL", True), ("no PDL", False))[not dependent_launch(rounds.device) :]:
        engine = block_engine(inputs, rounds.device, pdl=pdl)
        state = _reversed(engine, case, inputs)
        wrong = _wrong(name, state.x, inputs, exact, tolerance)
        found["failed"] += wrong
        passes |= {} if wrong else {name: functools.partial(engine.reverse, state)}
    samples = rounds.share(0.5).alternate(passes)
    return {**found, "steps": [_each(name, taken, tokens) for name, taken in samples.items()]}


def measure_cuda(case: Case, inputs: Inputs, exact: Tensor, tolerance: float, rounds: Rounds) -> dict[str, Any]:
    """Returns a sampling cell's "cuda": a step (a block's pass over T − 1), what each phase of it takes, and what is
    left without any: barriers and weights.

    The kernel is one launch, so a phase is measured by leaving it out. Its weights are fetched all the same, so what is
    saved is the phase's own work and what of the fetching it does not hide. A pass that leaves something out computes
    garbage, and no element of it is looked at.

    "launches_per_pass": of at most 64 rows each; "barriers_per_token": of all of them. "step": seconds, with
    their spread, of the whole step; "phases": [{name, …}], seconds that a step is shorter by without that phase, round
    by round; "barriers": seconds of a step without any. "failed": why these three are missing, if the images of a whole
    pass were not within the tolerance first.
    """
    tokens = case.sizes.num_patches - 1
    engine = CudaEngine(inputs.model.block_weights(0), device=rounds.device, dtype=DTYPE)
    barriers = engine.barriers(case.batch, 2 if case.guidance else 1)
    state = _reversed(engine, case, inputs)
    found: dict[str, Any] = {
        "launches_per_pass": len(barriers),
        "barriers_per_token": sum(barriers),
        "bytes_per_step": case.work.bytes / tokens,
        "failed": _wrong("cuda", state.x, inputs, exact, tolerance),
    }
    if found["failed"]:
        return found

    def without(phases: int) -> None:
        with engine.without_phases(state, phases):
            engine.reverse(state)

    skipped = {"step": 0, **{name: 1 << bit for bit, name in enumerate(PHASES)}, "barriers": ALL}
    samples = rounds.warm({name: functools.partial(without, phases) for name, phases in skipped.items()})
    saved = {name: [a - b for a, b in zip(samples["step"], samples[name], strict=True)] for name in PHASES}
    found |= {name: _each(name, samples[name], tokens) for name in ("step", "barriers")}
    return found | {"phases": [_each(name, each, tokens) for name, each in saved.items()]}
