"""A record is what a run of a suite leaves: one JSON file of the parts below. A suite describes the parts that it alone
has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypedDict

from tarflow_fast.files import replacing

Limits = dict[str, Any]
"""The machine's limits: rates by name, and for bandwidths lists of {bytes, bytes_per_second}."""


class Spread(TypedDict, total=False):
    """A spread is the median, the 20th and the 80th percentile of samples, which a ratio lists round by round."""

    median: float
    p20: float
    p80: float
    samples: list[float]


class Run(Spread, total=False):
    """A run is one candidate in one cell: its seconds in the order taken, and its rates at their median. All but the
    baseline have the ratio of its seconds to theirs. first_seconds is what making it and its first run took."""

    name: str
    seconds: list[float]
    bytes_per_second: float
    flops_per_second: float
    ratio: Spread
    fraction_of_limit: float
    first_seconds: float
    max_error: float | None


class Check(TypedDict):
    """A check compares results. max_error is None where there is no number, reason where the check has passed."""

    passed: bool
    max_error: float | None
    tolerance: float | None
    reason: str | None


class LeftOut(TypedDict, total=False):
    """The reason why the candidate of this name was not timed, or why the case of this label was not measured."""

    name: str
    label: dict[str, Any]
    reason: str


class Cell(TypedDict, total=False):
    """A cell is the result of one case. Its label holds the table's columns and their values, its work is a
    `roofline.Work`, and its limit is the least time that the machine allows, {seconds, by, bytes_per_second}. The
    baseline is the first of its runs; there are none if nothing was timed."""

    label: dict[str, Any]
    sizes: dict[str, Any]
    check: Check
    work: dict[str, int]
    limit: dict[str, Any]
    left_out: list[LeftOut]
    runs: list[Run]


class Record(TypedDict, total=False):
    """One run of a suite on the machine that `machine.describe` gives. not_run lists the cases without a cell, failures
    what went wrong beside the checks of cells."""

    suite: str
    date: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    limits: Limits
    cells: list[Any]
    not_run: list[LeftOut]
    failures: list[str]


def write(record: Record, path: Path) -> None:
    """Writes strict JSON; the folder is made if need be."""
    text = json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read(path: Path) -> Record:
    record: Record = json.loads(path.read_text(encoding="utf-8"))
    return record


def hardware(record: Record) -> str:
    """Returns the machine's name as tables and plots give it."""
    machine, threads = record["machine"], record["settings"]["threads"]
    name: str = machine["gpu"]["name"] if "gpu" in machine else f"{machine['cpu']}, {counted(threads, 'thread')}"
    return f"DRY RUN on {name}" if record["settings"].get("dry") else name


def short(value: Any) -> str:
    """Returns a label's value as text, 2.0 as 2."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def counted(count: int, thing: str, plural: str = "s") -> str:
    """Returns "1 thread" or "2 threads"."""
    return f"{count} {thing}{'' if count == 1 else plural}"


def values(cell: Any, between: str = ", ") -> str:
    """Returns the values of a cell's label, "small, 1, 2"."""
    return between.join(map(short, cell["label"].values()))


def title(label: dict[str, Any], between: str = ", ") -> str:
    """Returns a label as text, "model small, batch 1"."""
    return between.join(f"{column} {short(value)}" for column, value in label.items())
