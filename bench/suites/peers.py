"""`python -m bench peers` and `cpu`: our sampler against ml-tarflow's own `reverse`, same weights and noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import click

from tarflow_fast import TarFlowConfig
from tarflow_fast.backend.cpu.engine import choose_instruction_set

from ..common import models, options
from ..common.harness import measure_cell
from ..common.machine import CPU
from ..common.ml_tarflow import MlTarflow
from ..common.models import COMPILED, DTYPES, MODELS, one_block
from ..common.record import Cell
from ..common.roofline import Work, inverse_work
from ..common.suite import Suite

SIZES = {**{name: MODELS[name] for name in ("small", "medium", "tiny")}, "afhq": one_block(MODELS["afhq"])}
BATCHES = {"small": (1, 16, 64), "medium": (1, 64), "afhq": (1,), "tiny": (2,)}
SCALES = {"small": (0.0, 2.0), "tiny": (0.0, 2.0)}  # of guidance; 0 alone for the others


@dataclass(frozen=True)
class Case:
    """A batch of a model under a guidance scale, ours in this dtype. varies: the third column of its label."""

    config: str
    batch: int
    guidance: float = 0.0
    dtype: str = "float32"
    varies: str = "guidance"
    threads = None  # torch's

    @property
    def label(self) -> dict[str, Any]:
        return {"model": self.config, "batch": self.batch, self.varies: getattr(self, self.varies)}

    @property
    def sizes(self) -> TarFlowConfig:
        return SIZES[self.config]

    @property
    def work(self) -> Work:
        itemsize = DTYPES[self.dtype].itemsize
        return inverse_work(self.sizes, self.batch, guided=self.guidance > 0, itemsize=itemsize)


class Peers(Suite[Case]):
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
      of limit          the time that this machine's bandwidth and matrix rate would allow, over its time
      max error         the largest difference from ml-tarflow's images
    """

    names = ("peers", "cpu")
    baseline = "ml-tarflow"
    held = True

    def __init__(
        self, name: str, varies: str, backends: tuple[str, ...], dtypes: tuple[str, ...], configs: tuple[str, ...]
    ):
        """varies: see `Case`. backends: of ours. dtypes, configs: what is measured unless others are chosen."""
        self.name, self.varies, self.backends = name, varies, backends
        self.options = (
            options.CHECKOUT,
            options.several("--config", "configs", type=SIZES, default=configs, help="Models to be measured"),
            options.batches(*(BATCHES["small"] if name == "cpu" else ())),
            options.dtypes(dtypes),
            options.option("--compile", is_flag=True, help="Time the torch backend with compile=True too."),
            options.THREADS,
            *options.of_every_suite(name, 120.0 if name == "cpu" else 300.0),
        )

    def commands(self) -> list[click.Command]:
        return [self.command(), ON_CPU.command()]

    def prepare(self) -> None:
        self.ml_tarflow = MlTarflow.load(self.chosen.checkout)

    def settings(self) -> dict[str, Any]:
        found = {"instruction_set": choose_instruction_set()} if "cpu" in self.backends else {}
        found |= {"device": "cpu", "dtype": ", ".join(self.chosen.dtypes), "backend": ", ".join(self.backends)}
        return found | {"solver": "sequential", "compile": self.chosen.compile}

    def cases(self) -> list[Case]:
        """Returns every case that was chosen, each once."""
        return [
            Case(config, batch, guidance, dtype, self.varies)
            for config in dict.fromkeys(self.chosen.configs)
            for guidance in (SCALES.get(config, (0.0,)) if self.varies == "guidance" else (0.0,))
            for dtype in dict.fromkeys(self.chosen.dtypes)
            for batch in dict.fromkeys(self.chosen.batches or BATCHES[config])
        ]

    def measure(self, case: Case) -> Cell:
        assert self.ml_tarflow is not None
        seed, dtype = self.chosen.seed, DTYPES[case.dtype]
        inputs = (*models.inputs(case.sizes, case.batch, seed), case.guidance)
        compiled = {COMPILED: "torch"} if self.chosen.compile else {}
        ours = {"torch": "torch", **compiled, **{name: name for name in self.backends}}
        model = models.random_model(case.sizes, seed)
        candidates = models.samplers(self.baseline, self.ml_tarflow, ours, model, inputs, device=CPU, dtype=dtype)
        yardstick = None if case.dtype == "float32" else ("torch", dtype)
        return measure_cell(case, candidates, self.rounds, yardstick=yardstick)


SUITE = Peers("peers", "guidance", ("torch",), ("float32",), ("medium", "small"))
ON_CPU = Peers("cpu", "dtype", ("torch", "cpu"), tuple(DTYPES), ("small", "medium"))
