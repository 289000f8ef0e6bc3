"""What a suite is, and how it is run."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Sized
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Generic, TypeVar

import click
import torch

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
    others are compared with. options: of the command line; those that were chosen are attributes of `chosen`. A case
    has a `label`, the table's columns and their values.
    """

    name = ""
    names: tuple[str, ...] = ()
    baseline = ""
    options: tuple[click.Option, ...] = ()
    device = machine.CPU
    ml_tarflow: MlTarflow | None = None
    chosen: Any

    # What a suite says of a run.

    def prepare(self) -> None:
        """Check what was chosen and load what is measured. Raises click.ClickException where it cannot be."""

    def settings(self) -> dict[str, Any]:
        """How it is run, for the record, beside what every suite's settings have."""
        return {}

    def parts(self) -> dict[str, Any]:
        """What this suite's records alone have."""
        return {}

    def cases(self) -> Iterable[C]:
        """What is measured, in this order; cases may be made as their turn comes."""
        raise NotImplementedError

    def skip(self, case: C) -> str | None:
        """Why a case is not measured, asked when its turn has come."""
        return None

    def measure(self, case: C) -> Any:
        """The cell of a case, yet to be held to a limit."""
        raise NotImplementedError

    def limits(self) -> Limits:
        """What the machine can do at best; nothing if cells are not held to limits."""
        return {}

    def limits_again(self, case: C) -> Limits:
        """Some of the limits, measured again after a case."""
        return {}

    def limits_of(self, case: C, found: Limits) -> Limits:
        """Those that a case is held to."""
        return found

    # What it says of a record.

    def lines(self, record: Any) -> list[str]:
        """The table, below the line of the machine."""
        return cells_table(record)

    def figure(self, record: Any) -> plot.Figure:
        return plot.cells_figure(record)

    def verdicts(self, record: Any) -> list[str]:
        """What the finished cells say against the suite's own rule; it is kept in the record's "failures"."""
        return []

    def failures(self, record: Any) -> list[str]:
        """What makes the run a failure; empty if all is well."""
        failed = sum(not cell["check"]["passed"] for cell in record["cells"])
        checks = f"{failed} of {len(record['cells'])} checks failed; what failed was not timed"
        return [*([checks] if failed else []), *record["failures"]]

    # What is the same for all.

    @property
    def rounds(self) -> Rounds:
        return Rounds(self.chosen.repeat, self.chosen.budget, self.device)

    def table(self, record: Record) -> str:
        return "\n".join([f"machine: {hardware(record)}, {record['machine']['os']}", *self.lines(record)])

    def draw(self, record: Record, path: Path) -> None:
        """Write the record's picture as a PNG."""
        self.figure(record).savefig(path, dpi=130)

    def commands(self) -> list[click.Command]:
        """The suite's commands of `python -m bench`."""
        return [self.command()]

    def command(self) -> click.Command:
        def callback(**chosen: Any) -> None:
            run = copy.copy(self)
            run.chosen = SimpleNamespace(**chosen)
            run.run()

        params: list[click.Parameter] = list(self.options)
        return click.Command(self.name, callback=callback, params=params, help=inspect.getdoc(type(self)))

    def run(self) -> None:
        """Measure every case, writing the record after each; then write the PNG beside it and print the table.

        Raises click.ClickException (exit code 1) if something failed.
        """
        plot.require_matplotlib()
        out, threads = self.chosen.out, getattr(self.chosen, "threads", None)
        most = threads if isinstance(threads, int) else max(threads or (0,))
        with machine.torch_threads(most) if most else nullcontext():
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
        baseline = {} if self.ml_tarflow is None else {"baseline_sha256": self.ml_tarflow.sha256}
        how = {"repeat": self.chosen.repeat, "budget_seconds": self.chosen.budget, "seed": self.chosen.seed}
        settings = {"baseline": self.baseline, **baseline, "threads": torch.get_num_threads()}
        record: Any = {
            "suite": self.name,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine.describe(self.device),
            "settings": {**settings, **self.settings(), **how},
            "failures": [],
            **self.parts(),
        }
        return record | {"limits": {}, "cells": []}

    def _fill(self, record: Record) -> None:
        measured: list[tuple[C, Cell]] = []
        cases: Any = self.cases()
        of = f"/{len(cases)}" if isinstance(cases, Sized) else ""

        def hold() -> None:
            for case, cell in measured:
                if record["limits"]:
                    limits.hold_to_limit(cell, self.limits_of(case, record["limits"]))

        record["limits"] = self.limits()
        for number, case in enumerate(cases, 1):
            reason = self.skip(case)
            why = "" if reason is None else f": not run, {reason}"
            click.echo(f"[{number}{of}] {title(case.label)}{why}", err=True)
            if reason is not None:
                record.setdefault("not_run", []).append({"label": case.label, "reason": reason})
            else:
                measured.append((case, self.measure(case)))
                record["cells"].append(measured[-1][1])
                record["limits"] = limits.best(record["limits"], self.limits_again(case))
            hold()
            write(record, self.chosen.out)
        record["limits"] = limits.best(record["limits"], self.limits())
        hold()
