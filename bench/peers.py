"""`python -m bench peers`: our sampler against the published model's own `reverse`, same weights, same noise."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from tarflow_fast import Sampler
from tarflow_fast.sampling.noise import latent_noise

from . import limits, options
from .cells import CONFIGS, DEFAULT_CONFIGS, Cell, choose_cells, random_model
from .measure import measure_cell
from .published import Published
from .show import require_matplotlib
from .suite import new_record, run_cells

BASELINE = "ml-tarflow"


def contestants(cell: Cell, published: Published, *, seed: int, compile: bool) -> dict[str, Callable[[], Tensor]]:
    """The published reverse, under inference_mode as its own scripts run it, and then each of ours."""
    model = random_model(cell.sizes, seed)
    theirs = published.model(cell.sizes, model.state_dict())
    z = latent_noise(seed, range(cell.batch), cell.sizes.num_patches, cell.sizes.token_dim)
    y = torch.arange(cell.batch) % cell.sizes.num_classes if cell.sizes.num_classes else None
    reverses = {BASELINE: torch.inference_mode()(theirs.reverse)}
    reverses["torch"] = Sampler(model, backend="torch", solver="sequential").reverse
    if compile:
        torch.compiler.reset()  # else the code of earlier cells counts against torch's limit of recompilations
        reverses["torch compiled"] = Sampler(model, backend="torch", solver="sequential", compile=True).reverse
    return {name: functools.partial(run, z, y, guidance=cell.guidance) for name, run in reverses.items()}


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@click.command("peers")
@options.checkout
@click.option(
    "--config",
    "configs",
    multiple=True,
    type=click.Choice(list(CONFIGS)),
    default=DEFAULT_CONFIGS,
    help="Which models; may be given more than once.",
)
@click.option(
    "--batch",
    "batches",
    multiple=True,
    type=click.IntRange(1),
    help="Images at once, instead of the model's own list; may be given more than once.",
)
@click.option("--compile", is_flag=True, help="Time our sampler with compile=True too, as a row of its own.")
@options.threads
@options.repeat
@options.budget(300.0)
@options.seed
@options.out("peers")
def peers_command(
    checkout: Path,
    configs: tuple[str, ...],
    batches: tuple[int, ...],
    compile: bool,
    threads: int | None,
    repeat: int,
    budget: float,
    seed: int,
    out: Path,
) -> None:
    """Our sampler against the published model's reverse: same weights, noise, process, threads.

    In fp32 on the CPU. Each cell (a model, a batch, a guidance scale) is first checked: all images finite, and the
    largest difference at most 2e-4. A cell that fails is not timed, and the exit code is 1. Then the contestants
    take turns.

    \b
    Models, with random weights of a trained model's scale:
      medium  32×32×3, T = 256 tokens, width 256, 4 blocks of 4 layers; batches 1, 64
      small   28×28×1, T = 49 tokens, width 128, 4 blocks of 4 layers, 10 classes;
              batches 1, 16, 64, each without guidance and with scale 2
      tiny    to try the suite itself, in seconds

    \b
    Columns of the table:
      seconds, p20-p80  of one pass: the median of n samples, and their spread
      faster            median over the rounds of ml-tarflow's time / ours
      GB/s, GFLOP/s     the least memory traffic and arithmetic that the pass needs, over its time
      of limit          the time that this machine's bandwidth and matrix rate would allow, over its time
      max error         the largest difference from ml-tarflow's images
    """
    require_matplotlib()
    published = Published.load(checkout)
    cells = choose_cells(configs, batches)
    sizes = [size for cell in cells for size in (cell.work.weight_bytes, cell.work.working_set)]

    def measure(cell: Cell) -> dict[str, Any]:
        entrants = contestants(cell, published, seed=seed, compile=compile)
        return measure_cell(cell, entrants, repeat=repeat, budget=budget)

    with torch_threads(threads or torch.get_num_threads()):
        settings = {
            "device": "cpu",
            "dtype": "float32",
            "backend": "torch",
            "solver": "sequential",
            "compile": compile,
            "repeat": repeat,
            "budget_seconds": budget,
            "seed": seed,
        }
        record = new_record("peers", published, settings, baseline=BASELINE)
        run_cells(record, cells, measure=measure, rates=lambda: limits.measure(sizes), out=out)
