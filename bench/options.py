"""Options that every suite beside the published model has."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from . import machine
from .busy import cores

checkout = click.option(
    "--ml-tarflow",
    "checkout",
    required=True,
    metavar="PATH",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A checkout of ml-tarflow; its transformer_flow.py is imported.",
)
batches = click.option(
    "--batch",
    "batches",
    multiple=True,
    type=click.IntRange(1),
    default=(1, 16, 64),
    help="Images at once; may be given more than once.",
)
threads = click.option(
    "--threads", type=click.IntRange(1), help="Of every contestant.  [default: as many as torch takes]"
)


def _counts(context: click.Context, parameter: click.Parameter, counts: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(counts)) or tuple(range(1, cores() + 1))


every_threads = click.option(
    "--threads",
    multiple=True,
    type=click.IntRange(1, cores()),
    callback=_counts,
    help="Of every contestant; may be given more than once.  [default: every number up to that of the cores]",
)
repeat = click.option(
    "--repeat", type=click.IntRange(1), default=7, help="Times that each cell's contestants are timed."
)
seed = click.option("--seed", type=click.IntRange(0), default=0, help="Of weights and noise.")


def budget(
    seconds: float,
    help: str = "For timing one cell: slow cells are repeated less often, at least once; the record has the count.",
) -> Any:
    return click.option(
        "--budget",
        type=click.FloatRange(0, min_open=True),
        default=seconds,
        metavar="SECONDS",
        help=help,
    )


def out(suite: str) -> Any:
    def place(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path:
        if path is None:  # a new name for each run, so that none is overwritten
            stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
            return machine.ROOT / "bench" / "results" / f"{suite}-{stamp}.json"
        if path.suffix != ".json":
            raise click.BadParameter("the name must end in .json")
        return path

    return click.option(
        "--out",
        type=click.Path(dir_okay=False, path_type=Path),
        callback=place,
        metavar="FILE.json",
        help=f"Where the record goes, its PNG beside it.  [default: bench/results/{suite}-DATE-TIME.json]",
    )
