"""`python -m bench cpu`: the native CPU engine against the published model, the torch backend and the roofline."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from tarflow_fast import Sampler, TarFlowConfig
from tarflow_fast.backend.cpu.engine import choose_instruction_set
from tarflow_fast.sampling.noise import latent_noise

from . import limits, options
from .cells import Cell, random_model
from .measure import Contestants, check, measure_cell
from .peers import BASELINE, torch_threads
from .published import Published
from .roofline import Work, inverse_work
from .show import require_matplotlib
from .suite import new_record, run_cells

MODELS = {
    "small": TarFlowConfig(1, 28, 4, 128, 4, 4),
    "medium": TarFlowConfig(3, 32, 2, 256, 4, 4),
    "afhq": TarFlowConfig(3, 256, 8, 768, 1, 8),
    "tiny": TarFlowConfig(1, 8, 2, 64, 2, 1),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MATRIX_RATES = {"float32": "matrix_flops_per_second", "bfloat16": "bf16_matrix_flops_per_second"}


@dataclass(frozen=True)
class TypedCell(Cell):
    dtype: str = "float32"

    @property
    def label(self) -> dict[str, Any]:
        return {"model": self.config, "batch": self.batch, "dtype": self.dtype}

    @property
    def sizes(self) -> TarFlowConfig:
        return MODELS[self.config]

    @property
    def work(self) -> Work:
        return inverse_work(self.sizes, self.batch, itemsize=DTYPES[self.dtype].itemsize)


def contestants(cell: TypedCell, published: Published, *, seed: int, compile: bool) -> dict[str, Callable[[], Tensor]]:
    """The published reverse, in fp32 in every cell, and then ours in the cell's dtype."""
    model = random_model(cell.sizes, seed)
    theirs = published.model(cell.sizes, model.state_dict())
    z = latent_noise(seed, range(cell.batch), cell.sizes.num_patches, cell.sizes.token_dim)
    ours = functools.partial(Sampler, model, dtype=DTYPES[cell.dtype], solver="sequential")
    reverses = {BASELINE: torch.inference_mode()(theirs.reverse), "torch": ours(backend="torch").reverse}
    if compile:
        torch.compiler.reset()  # else the code of earlier cells counts against torch's limit of recompilations
        reverses["torch compiled"] = ours(backend="torch", compile=True).reverse
    reverses["cpu"] = ours(backend="cpu").reverse
    return {name: functools.partial(run, z.clone()) for name, run in reverses.items()}


def measure_rates(cells: list[TypedCell]) -> dict[str, Any]:
    """The machine's limits for these cells, in both dtypes."""
    rates = limits.measure(size for cell in cells for size in (cell.work.weight_bytes, cell.work.working_set))
    return {**rates, MATRIX_RATES["bfloat16"]: limits.matrix_rate(torch.bfloat16)}


def check_bf16(entrants: Contestants) -> dict[str, Any]:
    """Like `check`; what may differ is twice what the torch backend in bf16 does, and half a unit of bf16."""
    wanted, plain = entrants[BASELINE](), entrants["torch"]()
    floor = 0.5 * torch.finfo(torch.bfloat16).eps * float(wanted.abs().max())
    return check(entrants, 2 * float((plain - wanted).abs().max()) + floor)


@click.command("cpu")
@options.checkout
@click.option(
    "--config",
    "configs",
    multiple=True,
    type=click.Choice(list(MODELS)),
    default=("small", "medium"),
    help="Which models; may be given more than once.",
)
@options.batches
@click.option(
    "--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)), default=tuple(DTYPES), help="Of ours."
)
@click.option("--compile", is_flag=True, help="Time the torch backend with compile=True too.")
@options.threads
@options.repeat
@options.budget(120.0)
@options.seed
@options.out("cpu")
def cpu_command(
    checkout: Path,
    configs: tuple[str, ...],
    batches: tuple[int, ...],
    dtypes: tuple[str, ...],
    compile: bool,
    threads: int | None,
    repeat: int,
    budget: float,
    seed: int,
    out: Path,
) -> None:
    """The native CPU engine against the published reverse, the torch backend and the machine's limit.

    Sequential passes over the same weights and noise, in one process with the same threads. The baseline is
    ml-tarflow in fp32 in every cell; ours are in the cell's dtype. A cell is timed only if its images are right:
    within 2e-4 in fp32, within twice the torch backend's own error in bf16. The limit is that of the cell's dtype.

    \b
    Models, with random weights of a trained model's scale:
      small   28×28×1, T = 49, width 128, 4 blocks of 4 layers
      medium  32×32×3, T = 256, width 256, 4 blocks of 4 layers
      afhq    256×256×3, T = 1024, width 768, one block of 8 layers
      tiny    to try the suite itself, in seconds
    """
    require_matplotlib()
    published = Published.load(checkout)
    cells = [TypedCell(c, b, 0.0, d) for c in configs for d in dtypes for b in batches]
    with torch_threads(threads or torch.get_num_threads()):
        settings = {
            "instruction_set": choose_instruction_set(),
            "device": "cpu",
            "dtype": ", ".join(dtypes),
            "solver": "sequential",
            "compile": compile,
            "repeat": repeat,
            "budget_seconds": budget,
            "seed": seed,
        }
        record = new_record("cpu", published, settings, baseline=BASELINE)

        def measure(cell: TypedCell) -> dict[str, Any]:
            entrants = contestants(cell, published, seed=seed, compile=compile)
            verdict = check if cell.dtype == "float32" else check_bf16
            entry = measure_cell(cell, entrants, repeat=repeat, budget=budget, verdict=verdict)
            name = MATRIX_RATES[cell.dtype]
            record["limits"][name] = max(record["limits"][name], limits.matrix_rate(DTYPES[cell.dtype]))
            return entry

        run_cells(
            record,
            cells,
            measure=measure,
            rates=lambda: measure_rates(cells),
            rates_of=lambda cell, rates: {**rates, "matrix_flops_per_second": rates[MATRIX_RATES[cell.dtype]]},
            out=out,
        )
