"""Rows of numbers in CSV files and, on request, in TensorBoard's event files."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ArgumentError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Row = dict[str, float]


def _event_writer(folder: Path, step: int) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ArgumentError(
            "tensorboard", "the tensorboard package (pip install 'tarflow_fast[train]')", "none"
        ) from error
    return SummaryWriter(str(folder), purge_step=step + 1)


class MetricsLog:
    """`<out>/train.csv`, `<out>/eval.csv`: a header and one row a call, flushed at once.

    step: where the run starts; rows after it, left by a run that was killed later than its last
    checkpoint, are removed.
    """

    def __init__(self, out: Path, step: int = 0, tensorboard: bool = False):
        self.out = out
        self._events = _event_writer(out / "tensorboard", step) if tensorboard else None
        for path in (self._path("train"), self._path("eval")):
            if path.exists():
                self._truncate(path, step)

    def _path(self, kind: str) -> Path:
        return self.out / f"{kind}.csv"

    @staticmethod
    def _truncate(path: Path, step: int) -> None:
        with path.open(newline="") as file:
            header, *rows = list(csv.reader(file)) or [[]]
        # the last row may be half a row, and is then later than any checkpoint
        kept = [row for row in rows if len(row) == len(header) and int(row[0]) <= step]
        if not kept:
            path.unlink()
            return
        partial = path.with_name(path.name + ".partial")
        with partial.open("w", newline="") as file:
            csv.writer(file).writerows([header, *kept])
        os.replace(partial, path)

    def write(self, kind: str, step: int, row: Row) -> None:
        """kind: "train" or "eval"; step: optimiser steps done; row: the same names at every call."""
        path = self._path(kind)
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["step", *row])
            writer.writerow([step, *(f"{value:.8g}" for value in row.values())])
        if self._events is not None:
            for name, value in row.items():
                self._events.add_scalar(f"{kind}/{name}", value, step)
            self._events.flush()

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
