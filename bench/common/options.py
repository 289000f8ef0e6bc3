"""Options of the command line that several suites have. A suite's `options` are these and its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

from tarflow_fast import TarFlow, load, load_pretrained
from tarflow_fast.devices import check_device

from .machine import ROOT, cores
from .models import DTYPES


def option(*names: str, **how: Any) -> click.Option:
    """Returns an option whose help shows its default."""
    return click.Option(names, **{"show_default": True, **how})


def several(*names: str, type: Any, help: str, **how: Any) -> click.Option:
    """Returns an option that may be given more than once; a collection of names stands for a choice of these."""
    kind = click.Choice(list(type)) if isinstance(type, (tuple, dict)) else type
    return option(*names, multiple=True, type=kind, help=f"{help}; may be given more than once.", **how)


def count(name: str, help: str, **how: Any) -> click.Option:
    """Returns an option whose value is a number from 1 on."""
    return option(name, type=click.IntRange(1), help=help, **how)


FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
CHECKPOINT = click.Path(exists=True, dir_okay=False, path_type=Path)
MODEL: dict[str, Any] = {"type": CHECKPOINT, "metavar": "FILE", "show_default": "the model that ships with the package"}
MODEL_HELP = "A checkpoint, .pth or .safetensors"
BUDGET = "Time for timing one cell: slow cells are repeated less often, at least once; the record has the count."
THREADS = count("--threads", "Threads of every candidate.", show_default="as many as torch takes")
EVERY: dict[str, Any] = {"default": range(1, cores() + 1), "show_default": "every number up to that of the cores"}
EVERY_THREADS = several("--threads", type=click.IntRange(1, cores()), help="Threads of every candidate", **EVERY)
CHECKOUT = option("--ml-tarflow", "checkout", metavar="PATH", type=FOLDER, help="A checkout of ml-tarflow.")
ENGINE = (
    option("--backend", default="auto", help="The backend of tarflow_fast."),
    option("--device", default="cpu", help="A torch device.", callback=lambda *given: check_device(given[-1])),
)


def batches(*default: int) -> click.Option:
    help = "Images at once" if default else "Images at once, instead of the model's own list"
    return several("--batch", "batches", type=click.IntRange(1), default=default or None, help=help)


def dtypes(default: Sequence[str] = tuple(DTYPES)) -> click.Option:
    return several("--dtype", "dtypes", type=DTYPES, default=default, help="Dtypes to be measured")


def load_model(path: Path | None, device: torch.device) -> tuple[str, TarFlow]:
    """Returns the model that --model has chosen, and its name in records."""
    return ("fashion_mnist", load_pretrained(device=device)) if path is None else (path.name, load(path, device=device))


def of_every_suite(name: str, seconds: float, help: str = BUDGET) -> tuple[click.Option, ...]:
    """Returns --repeat, --budget, --seed and --out."""

    def place(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path:
        if path is None:  # a new name for each run, so that none is overwritten
            return ROOT / "bench" / "results" / f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.json"
        if path.suffix != ".json":
            raise click.BadParameter("the name must end in .json")
        return path

    positive, out = click.FloatRange(0, min_open=True), click.Path(dir_okay=False, path_type=Path)
    where: dict[str, Any] = {"metavar": "FILE.json", "show_default": f"bench/results/{name}-DATE-TIME.json"}
    return (
        count("--repeat", "How often each cell's candidates are timed.", default=7),
        option("--budget", "budget_seconds", type=positive, default=seconds, metavar="SECONDS", help=help),
        option("--seed", type=click.IntRange(0), default=0, help="The seed of weights and noise."),
        option("--out", type=out, callback=place, help="Where the record goes, its PNG beside it.", **where),
    )
