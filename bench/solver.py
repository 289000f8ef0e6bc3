"""`python -m bench solver`: in how many passes the adaptive solver and the published ones invert each block."""

from __future__ import annotations

from pathlib import Path

import click
import torch

from tarflow_fast import load, load_pretrained
from tarflow_fast.backend import choose_backend
from tarflow_fast.devices import check_device

from . import options
from .columns import short
from .peers import torch_threads
from .record import Record, write
from .show import finish, require_matplotlib
from .solver_cells import BASELINE, BOUND, FINAL, TOLS, measure, policies, problems
from .suite import new_record
from .timing import timer_of

PROMISED = f"adaptive {TOLS[1]:g}"


def passes_failure(record: Record) -> str | None:
    """What is wrong if adaptive took more dependent steps in all than the sequential pass, else None."""
    passes = dict.fromkeys((BASELINE, PROMISED), 0)
    for cell in record["cells"]:
        for run in cell["runs"]:
            if run["name"] in passes:
                passes[run["name"]] += run["passes"]
    if passes[PROMISED] <= passes[BASELINE]:
        return None
    return f"{PROMISED} took {passes[PROMISED]} passes, the sequential solver {passes[BASELINE]} steps"


@click.command("solver")
@click.option(
    "--model",
    "path",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A checkpoint, .pth or .safetensors.  [default: the Fashion-MNIST model that ships with the package]",
)
@click.option("--batch", type=click.IntRange(1), default=16, help="Images at once.")
@click.option("--guidance", type=click.FloatRange(0), default=0.0, help="Scale of classifier-free guidance.")
@click.option("--backend", default="auto", help="Of tarflow_fast.")
@click.option("--device", default="cpu", help="A torch device.")
@click.option("--segments", type=click.IntRange(1), default=7, help="Of GS-Jacobi: windows in a block.")
@click.option("--gs-passes", type=click.IntRange(1), default=5, help="Of GS-Jacobi: passes over each window.")
@options.threads
@options.repeat
@options.budget(30.0)
@options.seed
@options.out("solver")
def solver_command(
    path: Path | None,
    batch: int,
    guidance: float,
    backend: str,
    device: str,
    segments: int,
    gs_passes: int,
    threads: int | None,
    repeat: int,
    budget: float,
    seed: int,
    out: Path,
) -> None:
    """The adaptive solver against the sequential pass and the published parallel ones, block by block.

    On trained weights, in fp32: how fast guesses converge is a property of training. Every block begins from the
    sequential result of the block before, so that all policies are given the same input. Labels go round the classes
    and "no class".

    \b
    Policies:
      sequential     T - 1 steps; the baseline
      adaptive TOL   ours: parallel passes over the tokens ahead of each sample's frontier
      all-Jacobi τ   passes over all tokens until none of the batch moves by τ: 0.5 is the rule
                     of SeJD (arXiv 2505.24791), the others are for comparison at equal errors
      GS-Jacobi GxP  G windows one after another, P passes each, values held to ±3
                     (arXiv 2505.12849)

    Checked: adaptive is within 20 TOL of the sequential result in every block, and takes no more passes than the
    sequential solver has steps. A block that fails is not timed, and the exit code is 1.
    """
    require_matplotlib()
    place = check_device(device)
    model = load_pretrained(device=place) if path is None else load(path, device=place)
    name, reason = choose_backend(backend, place, torch.float32, False)
    with torch_threads(threads or torch.get_num_threads()):
        settings = {
            "model": "fashion_mnist" if path is None else path.name,
            "sizes": model.config.to_dict(),
            "device": place.type,
            "dtype": "float32",
            "backend": name,
            "backend_reason": reason,
            "batch": batch,
            "guidance": guidance,
            "final": FINAL,
            "bound": BOUND,
            "repeat": repeat,
            "budget_seconds": budget,
            "seed": seed,
        }
        record = new_record("solver", None, settings, baseline=BASELINE, device=place)
        record["failures"] = []
        contestants = policies(segments, gs_passes)
        for problem in problems(model, name, place, batch=batch, guidance=guidance, seed=seed):
            done = f"[{len(record['cells']) + 1}/{model.config.num_blocks}]"
            click.echo(f"{done} block {short(problem.block)}", err=True)
            entry = measure(problem, contestants, repeat=repeat, budget=budget, timer=timer_of(place))
            record["cells"].append(entry)
            write(record, out)
    failure = passes_failure(record)
    record["failures"] += [] if failure is None else [failure]
    finish(record, out)
