"""`python -m bench density`: log p and denoising on a CPU, our pass against torch's and the machine's matrix rate."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor

from tarflow_fast import TarFlow, load_pretrained
from tarflow_fast.backend.cpu.engine import choose_instruction_set
from tarflow_fast.devices import torch_threads

from ..common import harness, models, options, plot
from ..common.harness import Case
from ..common.models import DTYPES
from ..common.record import counted, hardware
from ..common.roofline import denoise_work, density_work
from ..common.suite import Suite

TOLERANCE = 2e-5  # fp32, absolute: of denoised values, and of log p for each value of an image
NAMES = ("shipped", "medium", "tiny")
OPERATIONS = {"log_prob": density_work, "denoise": denoise_work}
KINDS = ("#63aee8", "#1f4f94", "#f2b46b", "#c2590a", "#2f9457", "#8a5fb0", "#b8433f", plot.GREY)


@functools.cache
def model_of(name: str, seed: int) -> TarFlow:
    return load_pretrained() if name == "shipped" else models.random_model(models.MODELS[name], seed)


def case_of(model: str, operation: str, batch: int, dtype: str = "float32", threads: int = 1) -> Case:
    """Returns an operation on a batch, on so many threads, in fp32 or under torch's autocast."""
    label = {"model": model, "operation": operation, "batch": batch, "dtype": dtype, "threads": threads}
    sizes = model_of(model, 0).config
    return Case(label, sizes, OPERATIONS[operation](sizes, batch, itemsize=DTYPES[dtype].itemsize), dtype, threads)


def images_of(case: Case, seed: int) -> Tensor:
    """Returns noise about a grey image, as nothing here takes longer for better images."""
    generator = torch.Generator().manual_seed(seed)
    return 0.5 * torch.randn(case.label["batch"], *case.sizes.data_shape, generator=generator)


def compared(case: Case, images: Tensor, result: Tensor) -> Tensor:
    """Returns what of a result is held to the tolerance: how far denoising moves the images, or log p a value."""
    return result - images if case.label["operation"] == "denoise" else result / images[0].numel()


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
        options.several("--operation", "operations", type=OPERATIONS, default=tuple(OPERATIONS), help="Operations"),
        options.batches(1, 16, 80),
        options.dtypes(),
        options.EVERY_THREADS,
        *options.of_every_suite("density", 60.0),
    )

    def settings(self) -> dict[str, Any]:
        return {"instruction_set": choose_instruction_set()}

    def cases(self) -> list[Case]:
        lists = [getattr(self.chosen, name) for name in ("models", "operations", "batches", "dtypes", "threads")]
        return [case_of(*choice) for choice in itertools.product(*map(dict.fromkeys, lists))]

    def measure(self, case: Case) -> Any:
        """Our fp32 is held to torch's; in bf16 both are held to torch's fp32, by torch's own error."""
        seed, label, dtype = self.chosen.seed, case.label, DTYPES[case.dtype]
        images, (_, y) = images_of(case, seed), models.inputs(case.sizes, label["batch"], seed)
        given = (label["operation"], model_of(label["model"], seed), images, y)
        view = functools.partial(compared, case, images)
        with torch_threads(case.threads):
            held: dict[str, Any] = {"tolerance": TOLERANCE}
            if dtype != torch.float32:
                exact = view(models.density(*given, "torch", label["threads"])())
                held = {"exact": exact, "yardstick": ("torch", dtype)}
            how = {name: (*given, name, label["threads"], dtype) for name in ("torch", "cpu")}
            candidates = {name: functools.partial(models.density, *given) for name, given in how.items()}
            return harness.measure_cell(case, candidates, self.rounds, view=view, **held)

    def figure(self, record: Any) -> plot.Figure:
        """Returns a panel for each model and operation: bars of the ratio to torch, in groups by batch, with the share
        of the machine's limit written below the ratio."""
        cells, panels = record["cells"], dict[str, plot.Panel]()
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
        columns = len({cell["label"]["operation"] for cell in cells})
        size = (max(3.2, 0.45 * len(next(iter(panels.values())).groups) * len(colours) + 0.6), 2.9)
        said = "median, line from p20 to p80; below the ratio the share of the machine's limit"
        below = f"{hardware(record)}, torch {record['machine']['torch']}\n{said}"
        ylabel = f"times faster than {record['settings']['baseline']}"
        legend: dict[str, Any] = {"names": colours, "legend_columns": min(4, len(colours))}
        return plot.draw(list(panels.values()), columns, size, below, ylabel=ylabel, small=7, **legend)


SUITE = Density()
