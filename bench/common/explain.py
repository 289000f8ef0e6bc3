"""How passes of the CPU engine are divided on this machine and why: what its model expects, and what is measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from tarflow_fast import TarFlowConfig
from tarflow_fast.backend.cpu.engine import CpuEngine
from tarflow_fast.engine import Condition
from tarflow_fast.native import load_native

from . import models
from .limits import fastest
from .record import counted
from .roofline import inverse_work

STEPS = 2  # of a pass that has next to no attention


def machine_line() -> str:
    """Returns the caches that schedules are made for."""
    caches, source = load_native().caches()
    sizes = [f"{level} {size / 2**10:.0f} KiB for {counted(cores, 'core')}" for level, (size, cores) in caches.items()]
    return f"caches ({source}): {', '.join(sizes)}"


def _lines(name: str, config: TarFlowConfig, engine: CpuEngine, batch: int, seed: int) -> Iterator[str]:
    plan, itemsize = engine.schedule(batch), engine.dtype.itemsize
    work, tokens = inverse_work(config, batch, itemsize=itemsize), config.num_patches
    state = engine.begin(models.inputs(config, batch, seed)[0], Condition())
    whole = fastest(lambda: engine.reverse(state))
    products = min(whole, fastest(lambda: engine.reverse(state, start=1, stop=1 + STEPS)) * (tokens - 1) / STEPS)
    keys = batch * config.layers_per_block * config.channels * tokens * (tokens - 1) * itemsize
    flops = batch * (tokens - 1) * 24 * config.layers_per_block * config.channels**2

    def rate(amount: float, seconds: float) -> str:
        return f"{amount / seconds / 1e9:.1f}" if seconds > 0 else "-"

    yield f"{name}, {engine.instruction_set}, {str(engine.dtype)[6:]}, batch {batch}, one block"
    yield (
        f"  {counted(int(plan['teams']), 'team')} of {counted(int(plan['team_size']), 'thread')}; groups of up to "
        f"{plan['group_rows']} rows, in tiles of {plan['tile_rows']}; {plan['near_bytes'] / 2**10:.0f} KiB of a panel "
        f"stay in L1; weights {work.weight_bytes / 2**20:.1f} MiB for each group, with keys and values "
        f"{work.working_set / 2**20:.1f} MiB in all"
    )
    expected, attention = plan["products"], plan["attention"]
    yield (
        f"  products and the rest: {rate(flops, expected)} GFLOP/s expected, {rate(flops, products)} measured; "
        f"{expected:.3g} s, {products:.3g} s"
    )
    yield (
        f"  attention: {rate(keys, attention)} GB/s expected, {rate(keys, whole - products)} measured; "
        f"{attention:.3g} s, {whole - products:.3g} s"
    )
    yield f"  barriers: {plan['waiting']:.3g} s expected; the pass: {whole:.3g} s measured"


def lines(
    configs: Mapping[str, TarFlowConfig],
    isas: Iterable[str],
    dtypes: Iterable[str],
    batches: Iterable[int],
    threads: int | None,
    seed: int,
) -> Iterator[str]:
    """Returns what is printed, of one block of each of these models."""
    yield machine_line()
    for name, sizes in configs.items():
        config = replace(sizes, num_blocks=1, num_classes=0)
        weights = models.random_model(config, seed).block_weights(0)
        for isa in isas:
            for dtype in dict.fromkeys(dtypes):
                engine = CpuEngine(weights, dtype=models.DTYPES[dtype], instruction_set=isa, threads=threads)
                for batch in dict.fromkeys(batches):
                    yield from _lines(name, config, engine, batch, seed)
