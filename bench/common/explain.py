"""How passes of the CPU engine are divided on this machine and why: what its model expects, and what is measured."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from tarflow_fast.backend.cpu.engine import CpuEngine
from tarflow_fast.engine import Condition
from tarflow_fast.native import ISA_VARIABLE, load_native

from . import models
from .harness import Case
from .limits import fastest
from .record import counted, title
from .roofline import inverse_work

STEPS = 2  # of a pass that has next to no attention


def instruction_set(case: Case) -> AbstractContextManager[Any]:
    """Has the CPU engine that is made inside take the case's instruction set, if its label has one."""
    return patch.dict(os.environ, {ISA_VARIABLE: case.label["isa"]} if "isa" in case.label else {})


def _machine() -> str:
    """Returns the caches that schedules are made for."""
    caches, source = load_native().caches()
    sizes = [f"{level} {size / 2**10:.0f} KiB for {counted(cores, 'core')}" for level, (size, cores) in caches.items()]
    return f"caches ({source}): {', '.join(sizes)}"


def _rates(amount: float, unit: str, expected: float, measured: float) -> str:
    rate = [f"{amount / seconds / 1e9:.1f}" if seconds > 0 else "-" for seconds in (expected, measured)]
    return f"{rate[0]} {unit} expected, {rate[1]} measured; {expected:.3g} s, {measured:.3g} s"


def lines(cases: Iterable[Case], threads: int | None, seed: int) -> Iterator[str]:
    """Returns what is printed, of one block of each case."""
    yield _machine()
    for case in cases:
        config, batch = replace(case.sizes, num_blocks=1, num_classes=0), case.label["batch"]
        weights = models.random_model(config, seed).block_weights(0)
        with instruction_set(case):
            engine = CpuEngine(weights, dtype=models.DTYPES[case.dtype], threads=threads)
        plan, itemsize = engine.schedule(batch), engine.dtype.itemsize
        work, tokens = inverse_work(config, batch, itemsize=itemsize), config.num_patches
        state = engine.begin(models.inputs(config, batch, seed)[0], Condition())
        whole = fastest(lambda engine=engine, state=state: engine.reverse(state))  # type: ignore[misc]
        few = fastest(lambda engine=engine, state=state: engine.reverse(state, start=1, stop=1 + STEPS))  # type: ignore[misc]
        products = min(whole, few * (tokens - 1) / STEPS)
        keys = batch * config.layers_per_block * config.channels * tokens * (tokens - 1) * itemsize
        flops = batch * (tokens - 1) * 24 * config.layers_per_block * config.channels**2
        yield f"{title(case.label)}, {engine.instruction_set}, one block"
        yield (
            f"  {counted(int(plan['teams']), 'team')} of {counted(int(plan['team_size']), 'thread')}; groups of up to "
            f"{plan['group_rows']} rows, in tiles of {plan['tile_rows']}; {plan['near_bytes'] / 2**10:.0f} KiB of a "
            f"panel stay in L1; weights {work.weight_bytes / 2**20:.1f} MiB for each group, with keys and values "
            f"{work.working_set / 2**20:.1f} MiB in all"
        )
        yield f"  products and the rest: {_rates(flops, 'GFLOP/s', plan['products'], products)}"
        yield f"  attention: {_rates(keys, 'GB/s', plan['attention'], whole - products)}"
        yield f"  barriers: {plan['waiting']:.3g} s expected; the pass: {whole:.3g} s measured"
