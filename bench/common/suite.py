"""What a suite is, and how it is run."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Sized
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Generic, TypeVar

import click
import torch

from tarflow_fast.devices import torch_threads

from . import limits, machine, plot
from .harness import Rounds
from .ml_tarflow import MlTarflow
from .record import Cell, Limits, Record, hardware, title, write
from .table import cells_table

C = TypeVar("C")


class Suite(Generic[C]):
    """One suite of the bench; its docstring is the help of its command. A copy of it makes a run: `prepare` first, then
    the machine's limits, `measure` for each of the cases, and the limits again.

    name: the command's, and of the suite in records; names: all that records may have. baseline: the candidate that all
    others are compared with. options: of the command line; those that were chosen are attributes of `chosen`. held:
    whether cells are held to the machine's limits. A case has a `label`, the table's columns and their values.
    """

    name = ""
    names: tuple[str, ...] = ()
    baseline = ""
    options: tuple[click.Option, ...] = ()
    held = False
    device = machine.CPU
    ml_tarflow: MlTarflow | None = None
    chosen: Any

    # What a suite says of a run.

    def prepare(self) -> None:
        """Checks what was chosen and loads what is measured. Raises click.ClickException where it cannot be."""

    def settings(self) -> dict[str, Any]:
        """Returns how it is run, for the record, beside what every suite's settings have."""
        return {}

    def parts(self) -> dict[str, Any]:
        """Returns what this suite's records alone have."""
        return {}

    def cases(self) -> Iterable[C]:
        """Returns what is measured, in this order; cases may be made as their turn comes."""
        raise NotImplementedError

    def skip(self, case: C) -> str | None:
        """Returns why a case is not measured, asked when its turn has come."""
        return None

    def measure(self, case: C) -> Any:
        """Returns the cell of a case, yet to be held to a limit."""
        raise NotImplementedError

    def limits(self) -> Limits:
        """Returns what the machine can do at best; nothing if cells are not held to limits."""
        return limits.of_cases(self.cases()) if self.held else {}

    # What it says of a record.

    def lines(self, record: Any) -> list[str]:
        """Returns the table, below the line of the machine."""
        return cells_table(record)

    def figure(self, record: Any) -> plot.Figure:
        """Returns the picture."""
        return plot.cells_figure(record)

    def called(self, cell: Cell) -> str:
        """Returns what a failed cell is called."""
        return title(cell["label"])

    def verdicts(self, record: Any) -> list[str]:
        """Returns what the finished cells say against the suite's own rule; the record's "failures" keep it."""
        return []

    def failures(self, record: Any) -> list[str]:
        """Returns what makes the run a failure; nothing if all is well."""
        failed = sum(not cell["check"]["passed"] for cell in record["cells"])
        checks = f"{failed} of {len(record['cells'])} checks failed; what failed was not timed"
        return [*([checks] if failed else []), *record["failures"]]

    # What is the same for all.

    @property
    def rounds(self) -> Rounds:
        return Rounds(self.chosen.repeat, self.chosen.budget, self.device)

    def failed(self, record: Any) -> list[str]:
        """Returns a line for each cell that failed, and for each of the record's failures."""
        failed = [cell for cell in record["cells"] if not cell["check"]["passed"]]
        reasons = [f"{self.called(cell)}: {cell['check']['reason']}" for cell in failed]
        return [f"FAILED {reason}" for reason in [*reasons, *record.get("failures", [])]]

    def table(self, record: Record) -> str:
        return "\n".join([f"machine: {hardware(record)}, {record['machine']['os']}", *self.lines(record)])

    def draw(self, record: Record, path: Path) -> None:
        """Writes the record's picture as a PNG."""
        self.figure(record).savefig(path, dpi=130)

    def commands(self) -> list[click.Command]:
        """Returns the suite's commands of `python -m bench`."""
        return [self.command()]

    def command(self) -> click.Command:
        def callback(**chosen: Any) -> None:
            run = copy.copy(self)
            run.chosen = SimpleNamespace(**chosen)
            run.run()

        return click.Command(self.name, callback=callback, params=[*self.options], help=inspect.getdoc(type(self)))

    def run(self) -> None:
        """Measures every case, writing the record after each; then writes the PNG beside it and prints the table.

        Raises click.ClickException (exit code 1) if something failed.
        """
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
        failures = self.failures(record)
        if failures:
            raise click.ClickException("\n".join(failures))

    def _new_record(self) -> Record:
        chosen = self.chosen
        settings = {"baseline": self.baseline, "threads": torch.get_num_threads(), **self.settings()}
        settings |= {} if self.ml_tarflow is None else {"baseline_sha256": self.ml_tarflow.sha256}
        settings |= {"repeat": chosen.repeat, "budget_seconds": chosen.budget, "seed": chosen.seed}
        date, where = datetime.now(UTC).isoformat(timespec="seconds"), machine.describe(self.device)
        record: Any = {"suite": self.name, "date": date, "machine": where, "settings": settings, "failures": []}
        return record | self.parts() | {"limits": {}, "cells": []}

    def _fill(self, record: Record) -> None:
        measured: list[C] = []
        cases: Any = self.cases()
        of = f"/{len(cases)}" if isinstance(cases, Sized) else ""

        def hold() -> None:
            for case, cell in zip(measured, record["cells"], strict=True):
                if record["limits"]:
                    limits.hold_to_limit(cell, limits.of_case(case, record["limits"]))

        record["limits"] = self.limits()
        for number, case in enumerate(cases, 1):
            reason = self.skip(case)
            why = "" if reason is None else f": not run, {reason}"
            click.echo(f"[{number}{of}] {title(case.label)}{why}", err=True)
            if reason is not None:
                record.setdefault("not_run", []).append({"label": case.label, "reason": reason})
            else:
                record["cells"].append(self.measure(case))
                measured.append(case)
                record["limits"] = limits.again(case, record["limits"])
            hold()
            write(record, self.chosen.out)
        record["limits"] = limits.best(record["limits"], self.limits())
        hold()
