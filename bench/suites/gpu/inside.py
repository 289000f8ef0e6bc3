"""Inside the engines for GPUs: each kernel of the Triton engine, each phase of the CUDA engine's, and what is told of
them. What is run comes from the engines themselves and from `backend/triton/profile.py`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tarflow_fast import TarFlow
from tarflow_fast.backend.cuda.engine import PHASES, CudaEngine
from tarflow_fast.engine import Condition, Guidance

from ...common.harness import Rounds, timed
from ...common.record import short, title
from ...common.table import table

DTYPE = torch.bfloat16
MICRO = ": {name} | µs: {us[median]:.2f} | p20-p80: {us[p20]:.2f}-{us[p80]:.2f}"
OPERATIONS = f"{MICRO} | MB: {{megabytes:.3f}} | GB/s: {{gigabytes:.1f}} | of limit: {{of_limit:.1%}}"
PHASE = f"{MICRO} | of step: {{of_step:.1%}}"


def _warm(runs: Mapping[str, Callable[[], object]], rounds: Rounds) -> dict[str, list[float]]:
    for run in runs.values():
        run()
    return rounds.alternate(runs)


def _each(name: str, samples: Sequence[float], of: int, **more: Any) -> Any:
    """Returns the times of one of so many that a sample is of."""
    return timed(name, [sample / of for sample in samples], **more)


def block_engine(engine: type[Any], model: TarFlow, inputs: tuple[Any, ...], rounds: Rounds) -> tuple[Any, Any]:
    """Returns an engine of the model's only block, and a state."""
    made, (z, y, guidance) = engine(model.block_weights(0), device=rounds.device, dtype=DTYPE), inputs
    return made, made.begin(z, Condition(y, Guidance(guidance)))


def measure_kernels(model: TarFlow, inputs: tuple[Any, ...], rounds: Rounds) -> dict[str, Any]:
    """Returns a sampling cell's "engine": launches per token; "launches", one that does nothing but wait for the one
    before; and "operations", a launch of each kernel at a late token, with the bytes that it has to move."""
    from tarflow_fast.backend.triton import profile  # Triton is there on Linux only
    from tarflow_fast.backend.triton.engine import TritonEngine

    engine, state = block_engine(TritonEngine, model, inputs, rounds)
    engine.reverse(state)
    empty = _warm(profile.empty_launches(rounds.device), rounds.share(0.1))
    found: dict[str, Any] = {"launches_per_token": engine.launches_per_token, "operations": []}
    found["launches"] = [_each(name, taken, profile.LAUNCHES) for name, taken in empty.items()]
    groups: dict[str, list[Any]] = {}
    for operation in engine.operations(state):
        groups.setdefault(operation[0], []).append(operation)
    for name, group in groups.items():
        runs, count = profile.cold_launches([run for _, run, _ in group], rounds.device)
        taken = _warm(runs, rounds.share(0.9 / len(groups)))
        seconds = [a - b for a, b in zip(taken["both"], taken.get("sweeps", itertools.repeat(0.0)), strict=False)]
        found["operations"].append(_each(name, seconds, count, bytes=sum(moved for *_, moved in group) / len(group)))
    return found


def measure_phases(model: TarFlow, inputs: tuple[Any, ...], rounds: Rounds) -> dict[str, Any]:
    """Returns a sampling cell's "cuda": its launches and barriers; "parts", the seconds of a step, of which a pass has
    T − 1: of the whole one, of what is saved by leaving a phase out, and of what is left without any.

    The kernel is one launch, so a phase is measured by leaving it out. Its weights are fetched all the same, so what is
    saved is the phase's own work and what of the fetching it does not hide.
    """
    engine, state = block_engine(CudaEngine, model, inputs, rounds)
    barriers = engine.barriers(len(inputs[0]), 2 if inputs[2] else 1)
    samples, steps = _warm(engine.passes_without(state), rounds), model.config.num_patches - 1
    parts = [_each("step", samples[""], steps)]
    for name in PHASES:
        saved = [a - b for a, b in zip(samples[""], samples[name], strict=True)]
        parts.append(_each(f"{name}, saved without it", saved, steps))
    parts.append(_each("step of barriers and weights alone", samples["all"], steps))
    return {"launches_per_pass": len(barriers), "barriers_per_token": sum(barriers), "parts": parts}


def lines(cell: Any, bandwidth: float) -> list[str]:
    """Returns the tables of a cell. bandwidth: bytes per second that a kernel is held to."""
    found, engine, cuda = [], cell.get("engine"), cell.get("cuda")
    if engine:
        rows = [{**part, "name": f"empty launch, {part['name']}"} for part in engine["launches"]]
        for part in engine["operations"]:
            rate, megabytes = part["bytes"] / part["median"], part["bytes"] / 1e6
            rows.append({**part, "megabytes": megabytes, "bytes_per_second": rate, "of_limit": rate / bandwidth})
        head = f"kernels of {title(cell['label'])}; {short(engine['launches_per_token'])} launches a token"
        found += ["", head, *table(OPERATIONS, rows)]
    if cuda:
        step = cuda["parts"][0]["median"]
        counts = f"{cuda['barriers_per_token']} barriers a token, {cuda['launches_per_pass']} launches a pass"
        head = f"inside the CUDA engine of {title(cell['label'])}; {counts}"
        found += ["", head, *table(PHASE, [{**part, "of_step": part["median"] / step} for part in cuda["parts"]])]
    return found
