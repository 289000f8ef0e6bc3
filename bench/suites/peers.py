"""`python -m bench peers` and `cpu`: our sampler against ml-tarflow's own `reverse`, same weights and noise."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import click

from tarflow_fast.native import choose_instruction_set, instruction_sets

from ..common import explain, gemm, harness, models, options
from ..common.harness import Case
from ..common.machine import CPU
from ..common.ml_tarflow import MlTarflow
from ..common.models import COMPILED, DTYPES, MODELS, ONE_BLOCK
from ..common.roofline import inverse_work
from ..common.suite import Suite

SIZES = {**{name: MODELS[name] for name in ("small", "medium", "tiny")}, "afhq": ONE_BLOCK["afhq"]}
BATCHES = {"small": (1, 16, 64), "medium": (1, 16, 64), "afhq": (1,), "tiny": (2,)}
SCALES = {"small": (0.0, 2.0), "tiny": (0.0, 2.0)}  # of guidance; 0 alone for the others


class Peers(Suite):
    """Our sampler against the published model's reverse: same weights, noise, process, threads.

    Sequential passes. ml-tarflow runs in fp32 in every cell, ours in the cell's dtype. What is timed is finite and
    right: within 2e-4 in fp32, in bf16 within twice the torch backend's own error and half a unit; else the exit code
    is 1. The limit is that of the cell's dtype.

    `peers` is of the torch backend in fp32, with and without guidance; `cpu` of the torch backend and of the native CPU
    engine, in both dtypes.

    \b
    Models, with random weights of a trained model's scale:
      small   28×28×1, T = 49 tokens, width 128, 4 blocks of 4 layers, 10 classes
      medium  32×32×3, T = 256, width 256, 4 blocks of 4 layers
      afhq    256×256×3, T = 1024, width 768, one block of 8 layers, 3 classes
      tiny    to try the suite itself, in seconds

    \b
    Columns of the table:
      faster            median over the rounds of ml-tarflow's time / ours
      GB/s, GFLOP/s     the least memory traffic and arithmetic that the pass needs, over its time
      of limit          the time that this machine's bandwidth and matrix rate would allow, over its time
      torch's products  of `cpu`: what torch's own products of the same shapes and dtype take, a second limit
    """

    baseline = "ml-tarflow"
    held = True

    def __init__(self, name: str, varies: str, *backends: str):
        """varies: the third column of labels, "guidance" or "dtype"."""
        self.name, self.backends, self.varies, self.panels = name, backends, varies, ("model", varies)
        dtypes = tuple(DTYPES) if varies == "dtype" else ("float32",)
        explained = options.option("--explain", is_flag=True, help="Tell how passes are divided and why, alone.")
        sets = options.several("--isa", "isas", type=str, help="Instruction sets of the CPU engine, or all")
        self.options = (
            options.CHECKOUT,
            *((explained, sets) if "cpu" in backends else ()),
            options.several("--config", "configs", type=SIZES, default=("small", "medium"), help="Models"),
            options.batches(),
            options.dtypes(dtypes),
            options.option("--compile", is_flag=True, help="Time the torch backend with compile=True too."),
            options.THREADS,
            *options.of_every_suite(name, 120.0),
        )

    def run(self) -> None:
        if getattr(self.chosen, "explain", False):
            click.echo("\n".join(explain.lines(self.cases(), self.chosen.threads, self.chosen.seed)))
        else:
            super().run()

    def prepare(self) -> None:
        self.ml_tarflow = MlTarflow.load(self.chosen.checkout)

    def settings(self) -> dict[str, Any]:
        found = {"instruction_set": ", ".join(self.instruction_sets())} if "cpu" in self.backends else {}
        found["baseline_sha256"] = self.ml_tarflow.sha256
        return {**found, "backend": ", ".join(self.backends), "solver": "sequential"}

    def instruction_sets(self) -> Iterable[str]:
        """Returns those that were asked for, or the one that is chosen here."""
        asked = self.chosen.isas
        return instruction_sets() if "all" in asked else dict.fromkeys(asked) or (choose_instruction_set(),)

    def cases(self) -> list[Case]:
        """Returns every case that was chosen, each once."""
        found, dtypes = [], dict.fromkeys(self.chosen.dtypes)
        for config in dict.fromkeys(self.chosen.configs):
            scales = SCALES.get(config, (0.0,)) if self.varies == "guidance" else (0.0,)
            batches = dict.fromkeys(self.chosen.batches or BATCHES[config])
            for guidance, dtype, batch in itertools.product(scales, dtypes, batches):
                work = inverse_work(SIZES[config], batch, guided=guidance > 0, itemsize=DTYPES[dtype].itemsize)
                label = {"model": config, "batch": batch, self.varies: dtype if self.varies == "dtype" else guidance}
                for more in [{"isa": isa} for isa in self.instruction_sets()] if "cpu" in self.backends else [{}]:
                    found.append(Case({**label, **more}, SIZES[config], work, dtype))
        return found

    def measure(self, case: Case) -> Any:
        seed, dtype = self.chosen.seed, DTYPES[case.dtype]
        inputs = (*models.inputs(case.sizes, case.label["batch"], seed), case.label.get("guidance", 0.0))
        compiled = {COMPILED: "torch"} if self.chosen.compile else {}
        ours = {"torch": "torch", **compiled, **{name: name for name in self.backends}}
        model = models.random_model(case.sizes, seed)
        candidates = models.samplers(self.baseline, self.ml_tarflow, ours, model, inputs, CPU, dtype)
        yardstick = None if case.dtype == "float32" else ("torch", dtype)
        with explain.instruction_set(case):
            cell = harness.measure_cell(case, candidates, self.rounds, yardstick=yardstick)
        return {**cell, **({"gemm": gemm.limit(case, dtype)} if "cpu" in self.backends else {})}

    def lines(self, record: Any) -> list[str]:
        return [*super().lines(record), *gemm.table(record)]


SUITES = (Peers("peers", "guidance", "torch"), Peers("cpu", "dtype", "torch", "cpu"))
