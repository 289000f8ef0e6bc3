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

from ..common import models, options, plot
from ..common.harness import measure_cell
from ..common.models import DTYPES, MODELS
from ..common.record import Cell, counted, hardware
from ..common.roofline import Work, denoise_work, density_work
from ..common.suite import Suite

TOLERANCE = 2e-5  # fp32, absolute: of denoised values, and of log p for each value of an image
NAMES = ("shipped", "medium", "tiny")
OPERATIONS = ("log_prob", "denoise")
KINDS = ("#63aee8", "#1f4f94", "#f2b46b", "#c2590a", "#2f9457", "#8a5fb0", "#b8433f", plot.GREY)


@functools.cache
def model_of(name: str, seed: int) -> TarFlow:
    return load_pretrained() if name == "shipped" else models.random_model(MODELS[name], seed)


@dataclass(frozen=True)
class Case:
    """An operation on a batch, on so many threads, in fp32 or under torch's autocast. The images are noise about a grey
    one, as nothing here takes longer for better images."""

    model: str
    operation: str
    batch: int
    dtype: str = "float32"
    threads: int = 1
    seed: int = 0

    @property
    def label(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("seed", "images")}

    @property
    def sizes(self) -> TarFlowConfig:
        return model_of(self.model, self.seed).config

    @property
    def work(self) -> Work:
        count = denoise_work if self.operation == "denoise" else density_work
        return count(self.sizes, self.batch, itemsize=DTYPES[self.dtype].itemsize)

    @functools.cached_property
    def images(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return 0.5 * torch.randn(self.batch, *self.sizes.data_shape, generator=generator)

    def run(self, backend: str, dtype: str) -> Callable[[], Tensor]:
        """Returns the operation by this backend, ready to be timed."""
        model, (_, y) = model_of(self.model, self.seed), models.inputs(self.sizes, self.batch, self.seed)
        return models.density(self.operation, model, self.images, y, backend, self.threads, DTYPES[dtype])

    def compared(self, result: Tensor) -> Tensor:
        """Returns what of a result is held to the tolerance: how far denoising moves the images, or log p a value."""
        return result - self.images if self.operation == "denoise" else result / self.images[0].numel()


class Density(Suite):
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
    baseline = "torch"
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
        return {"instruction_set": choose_instruction_set()}

    def cases(self) -> list[Case]:
        lists = [getattr(self.chosen, name) for name in ("models", "operations", "batches", "dtypes", "threads")]
        return [Case(*choice) for choice in itertools.product(*map(dict.fromkeys, lists), [self.chosen.seed])]

    def measure(self, case: Case) -> Cell:
        """Our fp32 is held to torch's; in bf16 both are held to torch's fp32, by torch's own error."""
        with torch_threads(case.threads):
            held: dict[str, Any] = {"tolerance": TOLERANCE}
            if case.dtype != "float32":
                exact = case.compared(case.run("torch", "float32")())
                held = {"exact": exact, "yardstick": ("torch", DTYPES[case.dtype])}
            candidates = {name: functools.partial(case.run, name, case.dtype) for name in ("torch", "cpu")}
            return measure_cell(case, candidates, self.rounds, view=case.compared, **held)

    def figure(self, record: Any) -> plot.Figure:
        """Returns a panel for each model and operation: bars of the ratio to torch, in groups by batch, with the share
        of the machine's limit written below the ratio."""
        cells, panels = record["cells"], {}
        kinds = [f"{cell['label']['dtype']}, {counted(cell['label']['threads'], 'thread')}" for cell in cells]
        colours = dict(zip(dict.fromkeys(kinds), itertools.cycle(KINDS), strict=False))
        for kind, cell in zip(kinds, cells, strict=True):
            label, bar = cell["label"], plot.Bar(colours[kind], "failed", plot.exactly(0.0))
            if cell["runs"]:
                faster, share = cell["runs"][-1]["ratio"], cell["runs"][-1]["fraction_of_limit"]
                bar = plot.Bar(bar.colour, f"{faster['median']:.2f}×\n{share:.0%}", faster)
            name = f"{label['operation']}, {label['model']} model"
            panel = panels.setdefault(name, plot.Panel(name, level=1))
            panel.groups.setdefault(f"batch {label['batch']}", []).append(bar)
        size = (max(3.2, 0.45 * len(next(iter(panels.values())).groups) * len(colours) + 0.6), 2.9)
        below = "median, line from p20 to p80; below the ratio the share of the machine's limit"
        return plot.draw(
            list(panels.values()),
            len({cell["label"]["operation"] for cell in cells}),
            size,
            f"{hardware(record)}, torch {record['machine']['torch']}\n{below}",
            names=colours,
            legend_columns=min(4, len(colours)),
            ylabel=f"times faster than {record['settings']['baseline']}",
            small=7,
        )


SUITE = Density()
