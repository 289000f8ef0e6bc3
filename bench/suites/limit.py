"""`python -m bench limit`: sequential passes of the CPU engine, in turns with what the machine can do at best."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import click
import torch
from torch import Tensor

from tarflow_fast.backend.cpu.engine import CpuEngine
from tarflow_fast.backend.pytorch.engine import TorchEngine
from tarflow_fast.devices import torch_threads
from tarflow_fast.engine import Condition
from tarflow_fast.engine.weights import BlockWeights
from tarflow_fast.native import choose_instruction_set

from ..common import harness, limits, models, options, plot
from ..common.harness import TOLERANCE, Case
from ..common.machine import CPU, cores
from ..common.models import DTYPES
from ..common.record import counted
from ..common.roofline import inverse_work, product_flops
from ..common.suite import Suite
from ..common.table import labelled

SIZES = {
    name: replace(models.MODELS[name], num_blocks=1, num_classes=0) for name in ("small", "medium", "afhq", "tiny")
}
PACE, PART = 0.2, 0.1  # what each turn takes at least: seconds, and of what is held to it
COLUMNS = (
    "run: {name} | n: {n} | ms: {ms[pass]:.4g} | faster: {faster} | products: {ms[products]:.4g} | "
    "weights: {ms[weights]:.4g} | attention: {ms[attention]:.4g} | in sequence: {sequence[median]:.0%} | "
    "time-weighted: {weighted[median]:.0%} | of limit: {share[median]:.0%} | "
    "p20-p80: {share[p20]:.0%}-{share[p80]:.0%} | max error: {error}"
)


def paced(run: Callable[[], object], threads: int, least: float) -> float:
    """Returns the mean seconds of as many runs as take `least` seconds, one at least, by so many of torch's threads: a
    short run may have a moment in which a shared machine is faster than it ever is for a long one."""
    with torch_threads(threads):
        started, count = time.perf_counter(), 0
        while count == 0 or time.perf_counter() - started < least:
            run()
            count += 1
        return (time.perf_counter() - started) / count


def quickest(amount: int, ways: list[Callable[[], object]]) -> tuple[int, Callable[[], object]]:
    """Returns how much there is to do, and the fastest of the ways to do it."""
    return amount, ways[0] if len(ways) == 1 else min(ways, key=limits.fastest)


@functools.cache
def weights_of(model: str, seed: int) -> BlockWeights:
    return models.random_model(SIZES[model], seed).block_weights(0)


@functools.cache
def plain(model: str, dtype: torch.dtype, seed: int) -> Tensor:
    """Returns the first sample, (1, T, D), as the torch backend makes it."""
    engine = TorchEngine(weights_of(model, seed), device=CPU, dtype=dtype)
    state = engine.begin(models.inputs(SIZES[model], 1, seed)[0], Condition())
    engine.reverse(state)
    return state.x.float()


def ends(x: Tensor) -> Tensor:
    """Returns the first and the last sample of x, NaN where any sample is not finite."""
    return x[[0, -1]] + 0 * x.sum()


def allowed(model: str, dtype: torch.dtype, seed: int) -> float:
    """Returns what a sample may be off: in bf16 twice what the torch backend is, and half a unit."""
    if dtype == torch.float32:
        return TOLERANCE
    exact = plain(model, torch.float32, seed)
    own = float((plain(model, dtype, seed) - exact).abs().max())
    return 2 * own + 0.5 * torch.finfo(dtype).eps * float(exact.abs().max())


class Limit(Suite):
    """The CPU engine's sequential pass of one block beside what this machine can do at best, in turns.

    In each round, for each number of threads, torch multiplies square matrices (2048×2048, in the dtype), torch reads a
    buffer as large as weights, keys and values over and over, and the engine passes: the products and the reads for 0.2
    seconds or a tenth of a pass, so that all have the same neighbours and the same clock. Shares are medians over the
    rounds. The first and the last sample have the same noise; both are within 2e-4 of the torch backend's in fp32, in
    bf16 within twice that backend's own error and half a unit, and all are finite; else the exit code is 1.

    \b
    Models, with random weights of a trained model's scale:
      small   T = 49 tokens, width 128, 4 layers
      medium  T = 256, width 256, 4 layers
      afhq    T = 1024, width 768, 8 layers
      tiny    to try the suite itself, in seconds

    \b
    Columns of the table:
      ms, faster     the pass, and how many times faster it is than with the first number of threads
      products       ms for its products with weights, at the rate of the square ones
      weights        ms for reading the weights once in each step, as fast as torch reads
      attention      ms for reading keys and values, and writing new ones, as fast as torch reads
      in sequence    (products + weights + attention) / pass
      time-weighted  (products + attention) / pass
      of limit       (the longer of products and weights, + attention) / pass, and its spread; above 100 % where what is
                     read lies nearer than such a buffer

    TARFLOW_FAST_CPU_ISA chooses the engine's instruction set, and torch has environment variables of its own. With

    \b
      TARFLOW_FAST_CPU_ISA=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2

    a machine with more does what one with AVX2 would: with `--dtype float32`, as a product in bf16 takes minutes there.
    """

    name = "limit"
    baseline = "limit"
    options = (
        options.several("--config", "configs", type=SIZES, default=("small", "medium"), help="Models"),
        options.batches(1, 16, 64),
        options.dtypes(),
        options.several(
            "--threads",
            type=click.IntRange(1, cores()),
            default=tuple(dict.fromkeys((1, cores()))),
            show_default="1, and as many as there are cores",
            help="Threads of every turn",
        ),
        *options.of_every_suite("limit", 60.0),
    )

    def settings(self) -> dict[str, Any]:
        return {"instruction_set": choose_instruction_set(), "torch_set": torch.backends.cpu.get_cpu_capability()}

    def cases(self) -> list[Case]:
        chosen = (self.chosen.configs, self.chosen.dtypes, self.chosen.batches)
        found = []
        for model, dtype, batch in itertools.product(*map(dict.fromkeys, chosen)):
            work = inverse_work(SIZES[model], batch, itemsize=DTYPES[dtype].itemsize)
            found.append(Case({"model": model, "dtype": dtype, "batch": batch}, SIZES[model], work, dtype))
        return found

    def measure(self, case: Case) -> Any:
        given = case.label["model"], DTYPES[case.dtype], self.chosen.seed
        exact, error = plain(given[0], torch.float32, given[2]), allowed(*given)
        engine = CpuEngine(weights_of(given[0], given[2]), dtype=given[1])
        z = models.inputs(case.sizes, case.label["batch"], self.chosen.seed)[0]
        z[-1] = z[0]
        state = engine.begin(z, Condition())

        def run() -> Tensor:
            engine.reverse(state)
            return state.x

        of = {"products": limits.square_products(given[1]), "reads": limits.reads(case.work.working_set)}
        trials, turns = dict[int, harness.Trial](), dict[tuple[int, str], Callable[[], float]]()
        for threads in dict.fromkeys(self.chosen.threads):
            with torch_threads(threads):
                trials[threads] = trial = harness.admit(lambda: run, exact.expand(2, -1, -1), error, view=ends)
                ways = {what: quickest(*each)[1] for what, each in of.items()} if trial.reason is None else {}
            for what, way in ways.items():
                turns[threads, what] = functools.partial(paced, way, threads, max(PACE, PART * trial.seconds))
            turns[threads, "pass"] = functools.partial(paced, run, threads, PACE)
        worst = max((trial.error for trial in trials.values() if trial.error is not None), default=None)
        wrong = "; ".join(f"{counted(n, 'thread')}: {trial.reason}" for n, trial in trials.items() if trial.reason)
        cell = harness.unmeasured(case, harness.check_of(wrong or None, worst, error))
        if wrong:
            return cell
        samples: Any = replace(self.rounds, timer=lambda turn: turn()).alternate(turns)  # type: ignore[arg-type,return-value]
        cell["runs"] = harness.runs_of({counted(n, "thread"): samples[n, "pass"] for n in trials}, case.work)
        for (threads, trial), timed in zip(trials.items(), cell["runs"], strict=True):
            timed["max_error"] = trial.error
            parts = {
                part: [amount * seconds / of[what][0] for seconds in samples[threads, what]]
                for part, (what, amount) in self._amounts(case).items()
            }
            timed["parts"] = {part: {"seconds": seconds, **harness.spread(seconds)} for part, seconds in parts.items()}
            rounds = list(zip(*parts.values(), strict=True))
            timed["sequence"] = harness.ratio([p + w + a for p, w, a in rounds], timed["seconds"])
            timed["weighted"] = harness.ratio([p + a for p, _, a in rounds], timed["seconds"])
            timed["share"] = harness.ratio([max(p, w) + a for p, w, a in rounds], timed["seconds"])
        return cell

    @staticmethod
    def _amounts(case: Case) -> dict[str, tuple[str, int]]:
        """Returns what the parts of the limit are made of: operations, and bytes."""
        weights = (case.sizes.num_patches - 1) * case.work.weight_bytes
        return {
            "products": ("products", product_flops(case.sizes, case.label["batch"])),
            "weights": ("reads", weights),
            "attention": ("reads", case.work.bytes - weights),
        }

    def lines(self, record: Any) -> list[str]:
        sets = record["settings"]["instruction_set"], record["settings"]["torch_set"]
        return ["instruction sets: {}; torch: {}".format(*sets), "", *labelled(COLUMNS, self._rows(record))]

    @staticmethod
    def _rows(record: Any) -> Iterable[tuple[Any, Any]]:
        for cell in record["cells"]:
            for run in cell["runs"]:
                spreads = {"pass": run, **run["parts"]}
                yield cell, {**run, "ms": {part: 1e3 * spread["median"] for part, spread in spreads.items()}}
            if not cell["runs"]:
                yield cell, {**cell["check"], "name": "FAILED"}

    def figure(self, record: Any) -> plot.Figure:
        return plot.bars(record, ("model", "dtype"), ("batch",), "time of the limit / time of the pass", "share")


SUITE = Limit()
