"""`python -m bench auto`: whether solver="auto" is as fast as the best fixed choice, for a model, dtype and batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import torch

from tarflow_fast import NonFiniteError, Sampler, SolverPlan, TarFlow, load, load_pretrained
from tarflow_fast.backend import choose_backend
from tarflow_fast.devices import check_device

from . import auto_cells, options
from .auto_cells import ALLOWED, HOPELESS
from .auto_entrants import BASELINE, Problem
from .columns import short
from .cpu import DTYPES
from .peers import torch_threads
from .record import Record, write
from .show import finish, require_matplotlib
from .suite import new_record
from .timing import timer_of

PRETRAINED = "fashion_mnist"


def models(paths: tuple[Path, ...], device: torch.device) -> Iterator[tuple[str, TarFlow]]:
    """One at a time, with the name that its cells have."""
    if not paths:
        yield PRETRAINED, load_pretrained(device=device)
    for path in paths:
        yield path.name, load(path, device=device)


def verdict_failures(record: Record) -> list[str]:
    """A line for each cell where auto takes longer than it may."""
    return [
        f"{', '.join(f'{column} {short(value)}' for column, value in cell['label'].items())}: auto takes "
        f"{cell['verdict']['slower']:.3f} times as long as {cell['verdict']['best']}, allowed {ALLOWED}"
        for cell in record["cells"]
        if cell["verdict"] is not None and not cell["verdict"]["met"]
    ]


def _distinct(context: click.Context, parameter: click.Parameter, paths: tuple[Path, ...]) -> tuple[Path, ...]:
    if len({path.name for path in paths}) < len(paths):
        raise click.BadParameter("cells are told apart by the files' names, and two of these are the same")
    return paths


@click.command("auto")
@click.option(
    "--model",
    "paths",
    multiple=True,
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    callback=_distinct,
    help="A checkpoint, .pth or .safetensors; may be given more than once.  [default: the Fashion-MNIST model that "
    "ships with the package]",
)
@options.batches
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=click.Choice(list(DTYPES)),
    default=tuple(DTYPES),
    help="May be given more than once.",
)
@click.option("--backend", default="auto", help="Of tarflow_fast.")
@click.option("--device", default="cpu", help="A torch device.")
@click.option(
    "--plan", "plan_images", type=click.IntRange(2), metavar="N", help="Time auto with a plan of N images too."
)
@options.threads
@options.repeat
@options.budget(60.0)
@options.seed
@options.out("auto")
def auto_command(
    paths: tuple[Path, ...],
    batches: tuple[int, ...],
    dtypes: tuple[str, ...],
    backend: str,
    device: str,
    plan_images: int | None,
    threads: int | None,
    repeat: int,
    budget: float,
    seed: int,
    out: Path,
) -> None:
    """solver="auto" against the sequential pass and every fixed window: never more than 5 % slower than the best?

    On trained weights: how many passes a block takes is a property of training. The whole inverse of one batch,
    unguided, the same latents for all; labels go round the classes and "no class".

    \b
    Contestants:
      sequential      T - 1 steps in every block; the baseline
      window W        the adaptive solver with this window in every block, at the default tol
      auto            once it has settled: two runs in a row with the same choices, of twelve
      auto with plan  the same, with a plan learnt beforehand (--plan); not judged

    Checked: every run is within 1e-3 of the sequential result in fp32, in bf16 within twice what the sequential result
    is off from fp32 and half a unit. A contestant that fails is not timed. A window is run once first; one that took
    twice as long as the fastest fixed choice is not timed again, and one that would take so long at best, by the costs
    of passes and what narrower windows took, is not run, unless that is over at once. The others take turns.

    The rule is met in a cell if the median over the rounds of auto's time / the best fixed choice's is at most 1.05.
    The best is the one of the least median; with few rounds some of that is luck, to auto's disadvantage. Where a check
    fails or the rule is not met, the record is written all the same and the exit code is 1.
    """
    require_matplotlib()
    place = check_device(device)
    reasons = {dtype: choose_backend(backend, place, DTYPES[dtype], False)[1] for dtype in dtypes}
    with torch_threads(threads or torch.get_num_threads()):
        settings = {
            "device": place.type,
            "dtype": ", ".join(dtypes),
            "backend": backend,
            "backend_reasons": reasons,
            "plan_images": plan_images,
            "allowed": ALLOWED,
            "hopeless": HOPELESS,
            "repeat": repeat,
            "budget_seconds": budget,
            "seed": seed,
        }
        record = new_record("auto", None, settings, baseline=BASELINE, device=place)
        record["failures"] = []
        for name, model in models(paths, place):
            plan = learn_plan(model, backend, place, plan_images, seed)
            for dtype in dtypes:
                for batch in batches:
                    problem = Problem(name, model, dtype, batch, backend, place, seed)
                    click.echo(", ".join(f"{column} {value}" for column, value in problem.label.items()), err=True)
                    try:
                        entry = auto_cells.measure(problem, plan, repeat=repeat, budget=budget, timer=timer_of(place))
                    except NonFiniteError as error:
                        entry = auto_cells.failed(problem, f"{BASELINE}: {error}")
                    record["cells"].append(entry)
                    write(record, out)
    record["failures"] = verdict_failures(record)
    finish(record, out)


def learn_plan(model: TarFlow, backend: str, device: torch.device, images: int | None, seed: int) -> SolverPlan | None:
    """In fp32, of images that no cell draws; of a model of classes, of all of them."""
    if images is None:
        return None
    sampler = Sampler(model, backend=backend, device=device, dtype=torch.float32, solver="sequential")
    return sampler.learn_plan(images, range(model.config.num_classes) or None, seed=seed + 1)
