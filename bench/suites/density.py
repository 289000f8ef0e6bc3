"""`python -m bench density`: log p and denoising on a CPU, our pass against torch's and the machine's matrix rate."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tarflow_fast import TarFlow, TarFlowConfig, load_pretrained
from tarflow_fast.backend.cpu.engine import choose_instruction_set
from tarflow_fast.devices import torch_threads

from ..common import options, plot
from ..common.harness import measure_cell
from ..common.machine import CPU
from ..common.ml_tarflow import autocast
from ..common.models import DTYPES, MODELS, denoised, labels, random_model, with_density
from ..common.record import Cell, counted, hardware
from ..common.roofline import Work, denoise_work, density_work
from ..common.suite import Suite

BASELINE, OURS = "torch", "cpu"
TOLERANCE = 2e-5  # fp32, absolute: of denoised values, and of log p for each value of an image
NOISE_STD = 0.1
SHIPPED = "shipped"
NAMES = (SHIPPED, "medium", "tiny")
OPERATIONS = ("log_prob", "denoise")
KINDS = ("#63aee8", "#1f4f94", "#f2b46b", "#c2590a", "#2f9457", "#8a5fb0", "#b8433f", plot.GREY)


@functools.cache
def model_of(name: str, seed: int) -> TarFlow:
    return load_pretrained() if name == SHIPPED else random_model(MODELS[name], seed)


@dataclass(frozen=True)
class Case:
    """An operation on a batch of images, on so many threads, in fp32 or under torch's autocast."""

    model: str
    operation: str
    batch: int
    dtype: str = "float32"
    threads: int = 1

    @property
    def label(self) -> dict[str, Any]:
        return dict(vars(self))

    @property
    def sizes(self) -> TarFlowConfig:
        return model_of(self.model, 0).config

    @property
    def work(self) -> Work:
        count = denoise_work if self.operation == "denoise" else density_work
        return count(self.sizes, self.batch, itemsize=DTYPES[self.dtype].itemsize)


@dataclass(frozen=True)
class Problem:
    """What an operation is done to: noise about a grey image, as nothing here takes longer for better images."""

    model: TarFlow
    images: Tensor
    y: Tensor | None

    @classmethod
    def of(cls, case: Case, seed: int) -> Problem:
        generator = torch.Generator().manual_seed(seed)
        images = 0.5 * torch.randn(case.batch, *case.sizes.data_shape, generator=generator)
        return cls(model_of(case.model, seed), images, labels(case.sizes, case.batch))

    def run(self, backend: str, operation: str, dtype: str, threads: int) -> Callable[[], Tensor]:
        """Returns the operation by this backend, ready to be timed."""
        if operation == "denoise":
            half = None if dtype == "float32" else DTYPES[dtype]
            how: dict[str, Any] = {"backend": backend, "threads": threads, "noise_std": NOISE_STD, "dtype": half}
            return lambda: denoised(self.model, self.images, self.y, batch_size=len(self.images), **how)
        log_prob = torch.no_grad()(with_density(self.model, backend, threads).log_prob)
        return functools.partial(autocast(log_prob, CPU, DTYPES[dtype]), self.images, self.y)

    def compared(self, operation: str, result: Tensor) -> Tensor:
        """Returns what of a result is held to the tolerance: how far denoising moves the images, or log p a value."""
        return result - self.images if operation == "denoise" else result / self.images[0].numel()


def _kind(cell: Cell) -> str:
    return f"{cell['label']['dtype']}, {counted(cell['label']['threads'], 'thread')}"


def _bar(cell: Cell, colour: str) -> plot.Bar:
    if not cell["runs"]:
        return plot.Bar(colour, 0.0, "failed")
    run = cell["runs"][-1]
    text = f"{run['ratio']['median']:.2f}×\n{100 * run['fraction_of_limit']:.0f}%"
    return plot.Bar(colour, run["ratio"]["median"], text, run["ratio"])


class Density(Suite[Case]):
    """log p and its gradient on the CPU: the C++ pass against torch's, and the machine's own matrix rate.

    log_prob is the density pass, denoise that pass and the gradient by the images. Same weights, images, process and
    threads; bf16 is torch's autocast. A cell is timed only if its results are right: in fp32 within 2e-5 of torch's, by
    values of the images, in bf16 within twice torch's own error. The limit is that of the cell's dtype and threads.

    \b
    Models:
      shipped  the Fashion-MNIST model of the package: 28×28×1, T = 49, width 128, 4 blocks of 4 layers
      medium   32×32×3, T = 256, width 256, 4 blocks of 4 layers, random weights
      tiny     to try the suite itself, in seconds
    """

    name = "density"
    baseline = BASELINE
    held = True
    options = (
        options.several("--model", "models", type=NAMES, default=NAMES[:2], help="Models to be measured"),
        options.several("--operation", "operations", type=OPERATIONS, default=OPERATIONS, help="Operations"),
        options.batches(1, 16, 80),
        options.dtypes(),
        options.EVERY_THREADS,
        *options.of_every_suite("density", 60.0),
    )

    def settings(self) -> dict[str, Any]:
        dtypes = ", ".join(self.chosen.dtypes)
        return {"instruction_set": choose_instruction_set(), "device": "cpu", "dtype": dtypes}

    def cases(self) -> list[Case]:
        lists = [getattr(self.chosen, name) for name in ("models", "operations", "batches", "dtypes", "threads")]
        return [Case(*choice) for choice in itertools.product(*map(dict.fromkeys, lists))]

    def measure(self, case: Case) -> Cell:
        """Our fp32 is held to torch's; in bf16 both are held to torch's fp32, by torch's own error."""
        problem = Problem.of(case, self.chosen.seed)
        with torch_threads(case.threads):
            run = functools.partial(problem.run, operation=case.operation, threads=case.threads)
            view = functools.partial(problem.compared, case.operation)
            how: dict[str, Any] = {"tolerance": TOLERANCE}
            if case.dtype != "float32":
                how = {"exact": view(run(BASELINE, dtype="float32")()), "yardstick": (BASELINE, DTYPES[case.dtype])}
            candidates = {name: functools.partial(run, name, dtype=case.dtype) for name in (BASELINE, OURS)}
            return measure_cell(case, candidates, self.rounds, view=view, **how)

    def figure(self, record: Any) -> plot.Figure:
        """Returns a panel for each model and operation: the ratio to torch by batch, and below each ratio the share of
        the machine's limit."""
        cells = record["cells"]
        models, operations, batches = (
            list(dict.fromkeys(cell["label"][column] for cell in cells)) for column in ("model", "operation", "batch")
        )
        colours = dict(zip(dict.fromkeys(map(_kind, cells)), itertools.cycle(KINDS), strict=False))
        pairs = list(itertools.product(models, operations))
        wide = max(3.2, 0.45 * len(batches) * len(colours) + 0.6)
        figure, panels = plot.grid(len(pairs), len(operations), (wide, 2.9), (0.8, 1.2))
        for axes, pair in zip(panels, pairs, strict=True):
            groups: dict[int, list[plot.Bar]] = {batch: [] for batch in batches}
            for cell in cells:
                if (cell["label"]["model"], cell["label"]["operation"]) == pair:
                    groups[cell["label"]["batch"]].append(_bar(cell, colours[_kind(cell)]))
            plot.bars(axes, list(groups.values()), [f"batch {batch}" for batch in batches], 7)
            axes.axhline(1, color=plot.GREY, linewidth=1.2, zorder=0)
            axes.set_title(f"{pair[1]}, {pair[0]} model", fontsize=11)
        figure.supylabel(f"times faster than {record['settings']['baseline']}", fontsize=10)
        plot.legend(figure, colours, min(4, len(colours)))
        below = "median, line from p20 to p80; below the ratio the share of the machine's limit"
        plot.footer(figure, f"{hardware(record)}, torch {record['machine']['torch']}\n{below}")
        return figure


SUITE = Density()
