"""Metrics go as rows of numbers to CSV files and, on request, to TensorBoard's event files."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ArgumentError, DataError
from ..files import replacing

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Row = dict[str, float]
KINDS = ("train", "eval", "layers")


def _event_writer(folder: Path, step: int) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ArgumentError(
            "tensorboard", "the tensorboard package (pip install 'tarflow_fast[train]')", "none"
        ) from error
    return SummaryWriter(str(folder), purge_step=step + 1)


class MetricsLog:
    """A `MetricsLog` writes `<out>/KIND.csv` for each of KINDS: a header and one row a call, in the file at once.

    out: the folder of the run. step: the number of steps done when the run starts; rows after it, left by a run that
    was killed later than its last checkpoint, are removed. tensorboard: whether to write event files too. Raises
    DataError for files that are no metrics, ArgumentError where TensorBoard is not installed.
    """

    def __init__(self, out: Path, step: int = 0, tensorboard: bool = False):
        self.out = out
        for path in map(self._path, KINDS):
            if path.exists():
                self._truncate(path, step)
        self._events = _event_writer(out / "tensorboard", step) if tensorboard else None

    def _path(self, kind: str) -> Path:
        return self.out / f"{kind}.csv"

    @staticmethod
    def _truncate(path: Path, step: int) -> None:
        with path.open(newline="", errors="replace") as file:
            try:
                header, *rows = list(csv.reader(file)) or [["step"]]
            except csv.Error as error:
                raise DataError(f"{path}: not the metrics of a run ({error})") from error
        if header[:1] != ["step"]:
            raise DataError(f"{path}: not the metrics of a run")
        # The last row may be half a row, and is then later than any checkpoint.
        kept = [row for row in rows if len(row) == len(header) and row[0].isdecimal() and int(row[0]) <= step]
        if not kept:
            path.unlink()
        elif kept != rows:
            with replacing(path, durable=True) as partial, partial.open("w", newline="") as file:
                csv.writer(file).writerows([header, *kept])

    def write(self, kind: str, step: int, row: Row) -> None:
        """Writes a row: it is in the file whole, or, where OSError is raised, not at all.

        kind: one of KINDS. step: the number of optimiser steps done. row: numbers by name, with the same names at
        every call.
        """
        path, text = self._path(kind), io.StringIO(newline="")
        writer = csv.writer(text)
        if not path.exists():
            writer.writerow(["step", *row])
        writer.writerow([step, *(f"{value:.8g}" for value in row.values())])
        with path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                written = file.write(text.getvalue().encode())
                if written < len(text.getvalue()):
                    file.write(text.getvalue().encode()[written:])  # this raises the reason
            except OSError as error:
                file.truncate(end)
                raise OSError(error.errno, error.strerror, str(path)) from error
        if self._events is not None:
            for name, value in row.items():
                self._events.add_scalar(f"{kind}/{name}", value, step)
            self._events.flush()

    def sync(self) -> None:
        """Returns when the disk has all rows."""
        for path in map(self._path, KINDS):
            if path.exists():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
