"""Inside the engines for GPUs: what a launch costs, each kernel of the Triton engine, each phase of the CUDA engine's.

Triton is there on Linux only, and is imported with this file.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tarflow_fast.backend.cuda.engine import PHASES, CudaEngine
from tarflow_fast.backend.triton import profile
from tarflow_fast.backend.triton.engine import TritonEngine
from tarflow_fast.engine import Condition, Guidance
from tarflow_fast.kernels.launch import dependent_launch

from ...common.harness import Rounds, difference, timed
from .cases import DTYPE, Case, Inputs

Operation = tuple[str, Callable[[], object], int]


def _each(name: str, samples: Sequence[float], of: int) -> Any:
    """Returns the times of one of so many that a sample is of."""
    return timed(name, [sample / of for sample in samples])


def measure_launches(rounds: Rounds) -> list[dict[str, Any]]:
    """Returns the seconds of one launch that does nothing but wait for the one before it."""
    samples = rounds.warm(profile.empty_launches(rounds.device))
    return [_each(name, taken, profile.LAUNCHES) for name, taken in samples.items()]


def measure_operations(operations: Sequence[Operation], rounds: Rounds) -> list[dict[str, Any]]:
    """Returns an entry for each name: times of one launch, and "bytes" and "bytes_per_second" of its mean traffic."""
    groups: dict[str, list[Operation]] = defaultdict(list)
    for operation in operations:
        groups[operation[0]].append(operation)
    entries = []
    for name, group in groups.items():
        runs, count = profile.cold_launches([run for _, run, _ in group], rounds.device)
        found = rounds.share(1 / len(groups)).warm(runs)
        moved, sweeps = sum(moved for _, _, moved in group) / len(group), found.get("sweeps", itertools.repeat(0.0))
        entry = _each(name, [a - b for a, b in zip(found["both"], sweeps, strict=False)], count)
        entries.append({**entry, "bytes": moved, "bytes_per_second": moved / entry["median"]})
    return entries


def block_engine(inputs: Inputs, device: torch.device, **options: Any) -> Any:
    """Returns the Triton engine of the model's only block."""
    return TritonEngine(inputs.model.block_weights(0), device=device, dtype=DTYPE, **options)


def _reversed(
    name: str, engine: Any, case: Case, inputs: Inputs, exact: Tensor, tolerance: float
) -> tuple[Any, list[str]]:
    """Returns the state after a whole pass, and what is wrong with its images, or nothing."""
    state = engine.begin(inputs.z, Condition(inputs.y, Guidance(case.guidance)))
    engine.reverse(state)
    reason = difference(inputs.model.unpatchify(state.x), exact, tolerance)[1]
    return state, [] if reason is None else [f"{name}: {reason}"]


def measure_engine(case: Case, inputs: Inputs, exact: Tensor, tolerance: float, rounds: Rounds) -> Any:
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
    held = (case, inputs, exact, tolerance)
    operations = engine.operations(_reversed("", engine, *held)[0])
    found: dict[str, Any] = {
        "launches_per_token": engine.launches_per_token,
        "operations": measure_operations(operations, rounds.share(0.5)),
        "bytes_per_step": case.work.bytes / tokens,
        "failed": [],
    }
    passes: dict[str, Callable[[], object]] = {}
    for name, pdl in (("PDL", True), ("no PDL", False))[not dependent_launch(rounds.device) :]:
        engine = block_engine(inputs, rounds.device, pdl=pdl)
        state, wrong = _reversed(name, engine, *held)
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
    state, failed = _reversed("cuda", engine, case, inputs, exact, tolerance)
    barriers = engine.barriers(case.batch, 2 if case.guidance else 1)
    found: dict[str, Any] = {
        "launches_per_pass": len(barriers),
        "barriers_per_token": sum(barriers),
        "bytes_per_step": case.work.bytes / tokens,
        "failed": failed,
    }
    if failed:
        return found
    samples = rounds.warm(engine.passes_without(state))
    saved = {name: [a - b for a, b in zip(samples[""], samples[name], strict=True)] for name in PHASES}
    found |= {"step": _each("step", samples[""], tokens), "barriers": _each("barriers", samples["all"], tokens)}
    return found | {"phases": [_each(name, each, tokens) for name, each in saved.items()]}
