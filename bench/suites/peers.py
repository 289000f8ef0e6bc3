"""`python -m bench peers` and `cpu`: our sampler against ml-tarflow's own `reverse`, same weights and noise."""

from __future__ import annotations

import os
from typing import Any
from unittest.mock import patch

import click

from tarflow_fast.native import ISA_VARIABLE, choose_instruction_set, instruction_sets

from ..common import explain, gemm, harness, models, options
from ..common.harness import Case
from ..common.machine import CPU
from ..common.ml_tarflow import MlTarflow
from ..common.models import COMPILED, DTYPES, MODELS, ONE_BLOCK
from ..common.roofline import inverse_work
from ..common.suite import Suite

SIZES = {**{name: MODELS[name] for name in ("small", "medium", "tiny")}, "afhq": ONE_BLOCK["afhq"]}
BATCHES = {"small": (1, 16, 64), "medium": (1, 64), "afhq": (1,), "tiny": (2,)}
ISAS: dict[str, Any] = {"show_default": "the one that is chosen here", "callback": lambda *given: _every_set(given[-1])}
SCALES = {"small": (0.0, 2.0), "tiny": (0.0, 2.0)}  # of guidance; 0 alone for the others


def _every_set(names: tuple[str, ...]) -> tuple[str, ...]:
    """Returns these instruction sets, each once; those of this machine for "all"; and the chosen one for none."""
    every = instruction_sets() if "all" in names else names or (choose_instruction_set(),)
    return tuple(choose_instruction_set(name) for name in dict.fromkeys(every))


class Peers(Suite):
    """Our sampler against the published model's reverse: same weights, noise, process, threads.

    Sequential passes. ml-tarflow runs in fp32 in every cell, ours in the cell's dtype. A cell is timed only if all
    images are finite and right: within 2e-4 in fp32, in bf16 within twice the torch backend's own error and half a
    unit; else the exit code is 1. Then the candidates take turns. The limit is that of the cell's dtype.

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
      seconds, p20-p80  of one pass: the median of n samples, and their spread
      faster            median over the rounds of ml-tarflow's time / ours
      GB/s, GFLOP/s     the least memory traffic and arithmetic that the pass needs, over its time
      torch's products  of `cpu`: what torch's own products of the same shapes and dtype take, a second limit
      of limit          the time that this machine's bandwidth and matrix rate would allow, over its time
      max error         the largest difference from ml-tarflow's images
    """

    baseline = "ml-tarflow"
    held = True

    def __init__(self, name: str, varies: str, backends: tuple[str, ...], dtypes: tuple[str, ...], *configs: str):
        """varies: the third column of labels. dtypes, configs: what is measured unless others are chosen."""
        self.name, self.varies, self.backends = name, varies, backends
        on_cpu = (
            options.option("--ml-tarflow", "checkout", metavar="PATH", type=options.FOLDER, help=options.IMPORTED),
            options.several("--isa", "isas", type=str, help="Instruction sets of the CPU engine, or all", **ISAS),
            options.option("--explain", is_flag=True, help="Tell how passes are divided and why, and nothing else."),
        )
        self.options = (
            *(on_cpu if name == "cpu" else (options.CHECKOUT,)),
            options.several("--config", "configs", type=SIZES, default=configs, help="Models to be measured"),
            options.batches(*(BATCHES["small"] if name == "cpu" else ())),
            options.dtypes(dtypes),
            options.option("--compile", is_flag=True, help="Time the torch backend with compile=True too."),
            options.THREADS,
            *options.of_every_suite(name, 120.0 if name == "cpu" else 300.0),
        )

    def run(self) -> None:
        if getattr(self.chosen, "explain", False):
            models_ = {name: SIZES[name] for name in dict.fromkeys(self.chosen.configs)}
            chosen = self.chosen
            lines = explain.lines(models_, chosen.isas, chosen.dtypes, chosen.batches, chosen.threads, chosen.seed)
            for line in lines:
                click.echo(line)
        elif self.chosen.checkout is None:
            raise click.UsageError("Missing option '--ml-tarflow'.")
        else:
            super().run()

    def prepare(self) -> None:
        self.ml_tarflow = MlTarflow.load(self.chosen.checkout)

    def settings(self) -> dict[str, Any]:
        found = {"instruction_set": ", ".join(self.chosen.isas)} if "cpu" in self.backends else {}
        return {**found, "backend": ", ".join(self.backends), "solver": "sequential"}

    def cases(self) -> list[Case]:
        """Returns every case that was chosen, each once."""

        def case(config: str, batch: int, **more: Any) -> Case:
            sizes, itemsize = SIZES[config], DTYPES[more["dtype"]].itemsize
            work = inverse_work(sizes, batch, guided=more["guidance"] > 0, itemsize=itemsize)
            isa = {"isa": more["isa"]} if more["isa"] else {}
            label = {"model": config, "batch": batch, self.varies: more[self.varies], **isa}
            return Case(label, sizes, work, more["dtype"])

        return [
            case(config, batch, guidance=guidance, dtype=dtype, isa=isa)
            for config in dict.fromkeys(self.chosen.configs)
            for guidance in (SCALES.get(config, (0.0,)) if self.varies == "guidance" else (0.0,))
            for dtype in dict.fromkeys(self.chosen.dtypes)
            for batch in dict.fromkeys(self.chosen.batches or BATCHES[config])
            for isa in getattr(self.chosen, "isas", (None,))
        ]

    def measure(self, case: Case) -> Any:
        seed, dtype = self.chosen.seed, DTYPES[case.dtype]
        inputs = (*models.inputs(case.sizes, case.label["batch"], seed), case.label.get("guidance", 0.0))
        compiled = {COMPILED: "torch"} if self.chosen.compile else {}
        ours = {"torch": "torch", **compiled, **{name: name for name in self.backends}}
        model = models.random_model(case.sizes, seed)
        candidates = models.samplers(self.baseline, self.ml_tarflow, ours, model, inputs, device=CPU, dtype=dtype)
        yardstick = None if case.dtype == "float32" else ("torch", dtype)
        if "isa" not in case.label:
            return harness.measure_cell(case, candidates, self.rounds, yardstick=yardstick)
        with patch.dict(os.environ, {ISA_VARIABLE: case.label["isa"]}):
            cell = harness.measure_cell(case, candidates, self.rounds, yardstick=yardstick)
        return {**cell, "gemm": gemm.limit(case.sizes, case.label["batch"], dtype)}

    def lines(self, record: Any) -> list[str]:
        return [*super().lines(record), *gemm.table(record)]


SUITES = (
    Peers("peers", "guidance", ("torch",), ("float32",), "medium", "small"),
    Peers("cpu", "dtype", ("torch", "cpu"), tuple(DTYPES), "small", "medium"),
)
