"""`python -m bench density`: log p and denoising on a CPU, our pass against torch's and the machine's matrix rate."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from tarflow_fast import TarFlow, TarFlowConfig, load_pretrained
from tarflow_fast.backend.cpu.engine import choose_instruction_set

from . import limits, options
from .cells import Cell, random_model
from .cpu import DTYPES
from .densities import denoised, with_density
from .density_table import rate_name
from .measure import Contestants, check, measure_cell
from .peers import torch_threads
from .roofline import Work, denoise_work, density_work
from .show import require_matplotlib
from .suite import new_record, run_cells

BASELINE = "torch"
TOLERANCE = 2e-5  # fp32, absolute: of denoised values, and of log p for each value of an image
NOISE_STD = 0.1
MODELS: dict[str, TarFlowConfig | None] = {  # None: the shipped model, of its own sizes
    "shipped": None,
    "medium": TarFlowConfig(3, 32, 2, 256, 4, 4),
    "tiny": TarFlowConfig(1, 8, 2, 64, 2, 1, num_classes=3),
}
OPERATIONS = ("log_prob", "denoise")
AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16}


@functools.cache
def model_of(name: str, seed: int) -> TarFlow:
    sizes = MODELS[name]
    return load_pretrained() if sizes is None else random_model(sizes, seed)


@dataclass(frozen=True)
class DensityCell(Cell):
    """guidance: not in use here, 0."""

    operation: str = "log_prob"
    dtype: str = "float32"
    threads: int = 1

    @property
    def label(self) -> dict[str, Any]:
        return {
            "model": self.config,
            "operation": self.operation,
            "batch": self.batch,
            "dtype": self.dtype,
            "threads": self.threads,
        }

    @property
    def sizes(self) -> TarFlowConfig:
        return model_of(self.config, 0).config

    @property
    def work(self) -> Work:
        counted = denoise_work if self.operation == "denoise" else density_work
        return counted(self.sizes, self.batch, itemsize=DTYPES[self.dtype].itemsize)


@dataclass(frozen=True)
class Problem:
    model: TarFlow
    images: Tensor
    y: Tensor | None

    @classmethod
    def of(cls, cell: DensityCell, seed: int) -> Problem:
        """Images of noise about a grey image: nothing here takes longer for better ones."""
        classes, generator = cell.sizes.num_classes, torch.Generator().manual_seed(seed)
        images = 0.5 * torch.randn(cell.batch, *cell.sizes.data_shape, generator=generator)
        return cls(model_of(cell.config, seed), images, torch.arange(cell.batch) % classes if classes else None)

    def run(self, backend: str, operation: str, dtype: str, threads: int) -> Callable[[], Tensor]:
        """The operation by this backend, ready to be timed."""
        half = AUTOCAST[dtype]
        if operation == "denoise":
            return functools.partial(
                denoised,
                self.model,
                self.images,
                self.y,
                noise_std=NOISE_STD,
                backend=backend,
                threads=threads,
                batch_size=len(self.images),
                dtype=half,
            )
        model = with_density(self.model, backend, threads)

        def log_prob() -> Tensor:
            with torch.no_grad(), torch.autocast("cpu", dtype=half, enabled=half is not None):
                return model.log_prob(self.images, self.y)

        return log_prob

    def compared(self, operation: str, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Of a result what is held to the tolerance: how far denoising moves the images, or log p for each value."""
        if operation == "denoise":
            return lambda: run() - self.images
        return lambda: run() / self.images[0].numel()


def verdict(contestants: Contestants, exact: Callable[[], Tensor] | None) -> dict[str, Any]:
    """`check` at TOLERANCE. exact: in bf16 torch's fp32 result, from which all may differ by twice what torch's bf16
    does, and half a unit of bf16."""
    if exact is None:
        return check(contestants, TOLERANCE)
    wanted = exact()
    floor = 0.5 * torch.finfo(torch.bfloat16).eps * float(wanted.abs().max())
    allowed = 2 * float((contestants[BASELINE]() - wanted).abs().max()) + floor
    return check({"exact": lambda: wanted, **contestants}, allowed)


def bandwidth_name(threads: int) -> str:
    return f"read_bandwidth_{threads}"


def measure_rates(cells: list[DensityCell]) -> dict[str, Any]:
    """The machine's limits at each number of threads, for each dtype; and, for the table, of fp32 at the last one."""
    rates: dict[str, Any] = {}
    found: dict[str, Any] = {}
    for threads in dict.fromkeys(cell.threads for cell in cells):
        here = [cell for cell in cells if cell.threads == threads]
        with torch_threads(threads):
            found = limits.measure({cell.work.working_set for cell in here})
            rates[rate_name("float32", threads)] = found["matrix_flops_per_second"]
            if any(cell.dtype == "bfloat16" for cell in here):
                rates[rate_name("bfloat16", threads)] = limits.matrix_rate(torch.bfloat16)
        rates[bandwidth_name(threads)] = found["read_bandwidth"]
    return {**found, **rates}


def rates_of(cell: DensityCell, rates: dict[str, Any]) -> dict[str, Any]:
    return {
        "matrix_flops_per_second": rates[rate_name(cell.dtype, cell.threads)],
        "read_bandwidth": rates[bandwidth_name(cell.threads)],
    }


@click.command("density")
@click.option(
    "--model",
    "models",
    multiple=True,
    type=click.Choice(list(MODELS)),
    default=("shipped", "medium"),
    help="Which models; may be given more than once.",
)
@click.option(
    "--operation",
    "operations",
    multiple=True,
    type=click.Choice(OPERATIONS),
    default=OPERATIONS,
    help="Which; may be given more than once.",
)
@click.option(
    "--batch",
    "batches",
    multiple=True,
    type=click.IntRange(1),
    default=(1, 16, 80),
    help="Images at once; may be given more than once.",
)
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)), default=tuple(DTYPES))
@options.every_threads
@options.repeat
@options.budget(60.0)
@options.seed
@options.out("density")
def density_command(
    models: tuple[str, ...],
    operations: tuple[str, ...],
    batches: tuple[int, ...],
    dtypes: tuple[str, ...],
    threads: tuple[int, ...],
    repeat: int,
    budget: float,
    seed: int,
    out: Path,
) -> None:
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
    require_matplotlib()
    cells = [
        DensityCell(model, batch, 0.0, operation, dtype, count)
        for model in dict.fromkeys(models)
        for operation in dict.fromkeys(operations)
        for batch in dict.fromkeys(batches)
        for dtype in dict.fromkeys(dtypes)
        for count in threads
    ]

    def measure(cell: DensityCell) -> dict[str, Any]:
        problem = Problem.of(cell, seed)

        def run(backend: str, dtype: str = cell.dtype) -> Callable[[], Tensor]:
            return problem.run(backend, cell.operation, dtype, cell.threads)

        def checked(contestants: Contestants) -> dict[str, Any]:
            compared = {name: problem.compared(cell.operation, entrant) for name, entrant in contestants.items()}
            exact = None if cell.dtype == "float32" else problem.compared(cell.operation, run(BASELINE, "float32"))
            return verdict(compared, exact)

        with torch_threads(cell.threads):
            entrants = {name: run(name) for name in (BASELINE, "cpu")}
            entry = measure_cell(cell, entrants, repeat=repeat, budget=budget, verdict=checked)
            name = rate_name(cell.dtype, cell.threads)
            record["limits"][name] = max(record["limits"][name], limits.matrix_rate(DTYPES[cell.dtype]))
            record["limits"]["matrix_flops_per_second"] = record["limits"][rate_name("float32", threads[-1])]
        return entry

    with torch_threads(max(threads)):
        settings = {
            "instruction_set": choose_instruction_set(),
            "device": "cpu",
            "dtype": ", ".join(dtypes),
            "repeat": repeat,
            "budget_seconds": budget,
            "seed": seed,
        }
        record = new_record("density", None, settings, baseline=BASELINE)
        run_cells(record, cells, measure=measure, rates=lambda: measure_rates(cells), rates_of=rates_of, out=out)
