"""What a suite is: a record, cells one by one, and limits before and after them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click
import torch

from . import limits, machine
from .cells import Cell
from .columns import short
from .measure import hold_to_limit
from .published import Published
from .record import Record, write
from .show import finish

C = TypeVar("C", bound=Cell)
Rates = dict[str, Any]


def new_record(
    suite: str,
    published: Published | None,
    settings: dict[str, Any],
    *,
    baseline: str,
    device: torch.device = limits.CPU,
) -> Record:
    """A record without limits and cells. published: if it is the baseline. settings: beside those of every suite."""
    return {
        "suite": suite,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(device),
        "settings": {
            "baseline": baseline,
            **({} if published is None else {"baseline_sha256": published.sha256}),
            "threads": torch.get_num_threads(),
            **settings,
        },
        "limits": {},
        "cells": [],
    }


def run_cells(
    record: Record,
    cells: Iterable[C],
    *,
    measure: Callable[[C], dict[str, Any]],
    rates: Callable[[], Rates],
    out: Path,
    rates_of: Callable[[C, Rates], Rates] = lambda cell, found: found,
    skip: Callable[[C], str | None] = lambda cell: None,
) -> None:
    """Fill the record's "limits" and "cells" (and "not_run"), writing it to `out` after each cell; then `finish`.

    measure: a cell's entry, yet to be held to a limit. rates: measures the machine's limits; rates_of: those that a
    cell is held to. skip: why a cell is not to be run, asked when its turn has come.
    """
    cells = list(cells)
    entries: list[tuple[C, dict[str, Any]]] = []

    def save() -> None:
        for cell, entry in entries:
            hold_to_limit(entry, rates_of(cell, record["limits"]))
        write(record, out)

    record["limits"] = rates()
    for number, cell in enumerate(cells, 1):
        label = ", ".join(f"{column} {short(value)}" for column, value in cell.label.items())
        reason = skip(cell)
        click.echo(f"[{number}/{len(cells)}] {label}{'' if reason is None else f': not run, {reason}'}", err=True)
        if reason is not None:
            record.setdefault("not_run", []).append({"label": cell.label, "reason": reason})
        else:
            entry = measure(cell)
            entries.append((cell, entry))
            record["cells"].append(entry)
        save()
    record["limits"] = limits.best(record["limits"], rates())
    save()
    finish(record, out)
