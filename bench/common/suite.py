"""What a suite is, and how it is run."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Sized
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import torch

from tarflow_fast.devices import torch_threads

from . import limits, machine, plot
from .harness import Rounds
from .record import Limits, hardware, title, write
from .table import cells_table


class Suite:
    """One suite of the bench; its docstring is the help of its command. A copy of it makes a run: `prepare` first, then
    `measure` for each of the cases, with the machine's limits before and after it.

    baseline: the candidate that all others are compared with. options: those that were chosen are attributes of
    `chosen`. held: whether cells are held to the machine's limits. panels, groups: the columns of labels that divide
    the picture, see `plot.bars`. A case has a `label`, the table's columns and their values.
    """

    name = baseline = ""
    options: tuple[click.Option, ...] = ()
    held = False
    panels: tuple[str, ...] = ("model",)
    groups: tuple[str, ...] = ("batch",)
    device = machine.CPU
    chosen: Any

    # What a suite says of a run.

    def prepare(self) -> None:
        """Checks what was chosen and loads what is measured. Raises click.ClickException where it cannot be."""

    def settings(self) -> dict[str, Any]:
        """Returns how it is run, for the record, beside what was chosen."""
        return {}

    def parts(self) -> dict[str, Any]:
        """Returns what this suite's records alone have."""
        return {}

    def cases(self) -> Iterable[Any]:
        """Returns what is measured, in this order; cases may be made as their turn comes."""
        raise NotImplementedError

    def measure(self, case: Any) -> Any:
        """Returns the cell of a case, yet to be held to a limit."""
        raise NotImplementedError

    def limits(self, case: Any) -> Limits:
        """Returns what the machine can do at best for a case; nothing if cells are not held to limits."""
        return limits.measure(case) if self.held else {}

    def verdicts(self, record: Any) -> list[str]:
        """Returns what the finished cells say against the suite's own rule; the record's "failures" keep it."""
        return []

    # What it says of a record.

    def lines(self, record: Any) -> list[str]:
        """Returns the table, below the line of the machine."""
        return cells_table(record)

    def figure(self, record: Any) -> plot.Figure:
        """Returns the picture."""
        return plot.bars(record, self.panels, self.groups, f"times faster than {self.baseline}")

    # What is the same for all.

    @property
    def rounds(self) -> Rounds:
        return Rounds(self.chosen.repeat, self.chosen.budget_seconds, self.device)

    def failed(self, record: Any) -> list[str]:
        """Returns a line for each cell that failed, and for each of the record's failures."""
        failed = [cell for cell in record["cells"] if not cell["check"]["passed"]]
        reasons = [f"{title(cell['label'])}: {cell['check']['reason']}" for cell in failed]
        return [f"FAILED {reason}" for reason in [*reasons, *record.get("failures", [])]]

    def table(self, record: Any) -> str:
        return "\n".join([f"machine: {hardware(record)}, {record['machine']['os']}", *self.lines(record)])

    def draw(self, record: Any, path: Path) -> None:
        """Writes the record's picture as a PNG."""
        self.figure(record).savefig(path, dpi=130)

    def command(self) -> click.Command:
        """Returns the suite's command of `python -m bench`."""

        def callback(**chosen: Any) -> None:
            run = copy.copy(self)
            run.chosen = SimpleNamespace(**chosen)
            run.run()

        return click.Command(self.name, callback=callback, params=[*self.options], help=inspect.getdoc(type(self)))

    def run(self) -> None:
        """Measures every case, writing the record after each; then writes the PNG beside it and prints the table.
        Raises click.ClickException (exit code 1) if something failed."""
        plot.require_matplotlib()
        out, threads = self.chosen.out, getattr(self.chosen, "threads", None)
        self.device = getattr(self.chosen, "device", self.device)
        with torch_threads(max(threads) if isinstance(threads, tuple) else threads):
            self.prepare()
            record = self._new_record()
            self._fill(record)
        record["failures"] += self.verdicts(record)
        write(record, out)
        picture = out.with_suffix(".png")
        self.draw(record, picture)
        click.echo(f"{self.table(record)}\n\n{out}\n{picture}")
        failed = sum(not cell["check"]["passed"] for cell in record["cells"])
        checks = [f"{failed} of {len(record['cells'])} checks failed; what failed was not timed"] if failed else []
        if checks or record["failures"]:
            raise click.ClickException("\n".join([*checks, *record["failures"]]))

    def _new_record(self) -> Any:
        settings = {name: value for name, value in vars(self.chosen).items() if isinstance(value, str | float | int)}
        settings |= {"baseline": self.baseline, "device": self.device.type, "threads": torch.get_num_threads()}
        settings |= {"dtype": ", ".join(getattr(self.chosen, "dtypes", ["float32"])), **self.settings()}
        date, where = datetime.now(UTC).isoformat(timespec="seconds"), machine.describe(self.device)
        record = {"suite": self.name, "date": date, "machine": where, "settings": settings, "failures": []}
        return record | self.parts() | {"limits": {}, "cells": []}

    def _fill(self, record: Any) -> None:
        measured: list[Any] = []
        cases: Any = self.cases()
        of = f"/{len(cases)}" if isinstance(cases, Sized) else ""
        for number, case in enumerate(cases, 1):
            click.echo(f"[{number}{of}] {title(case.label)}", err=True)
            before = self.limits(case)
            record["cells"].append(self.measure(case))
            measured.append(case)
            record["limits"] = limits.best(record["limits"], limits.best(before, self.limits(case)))
            self._hold(record, measured)
            write(record, self.chosen.out)

    def _hold(self, record: Any, cases: list[Any]) -> None:
        for case, cell in zip(cases, record["cells"] if record["limits"] else [], strict=False):
            limits.hold(cell, record["limits"], case)
