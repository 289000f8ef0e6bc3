"""What a run of a suite leaves: one JSON file, whose parts are the types below. Parts that one suite alone has are
described where that suite makes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypedDict

from tarflow_fast.files import replacing

Limits = dict[str, Any]
"""The machine's limits: rates by name, and for bandwidths lists of {bytes, bytes_per_second}."""


class Spread(TypedDict):
    """The median, 20th and 80th percentile of samples."""

    median: float
    p20: float
    p80: float


class Ratio(Spread):
    """A baseline's seconds over a run's, round by round: how many times faster the run was."""

    samples: list[float]


class Check(TypedDict):
    """max_error is None where there is no number. reason says why the check failed, and is None if it passed."""

    passed: bool
    max_error: float | None
    tolerance: float | None
    reason: str | None


class LeftOut(TypedDict):
    """A candidate that was not timed, and why."""

    name: str
    reason: str


class NotRun(TypedDict):
    """A case that was not measured, and why."""

    label: dict[str, Any]
    reason: str


class Run(TypedDict, total=False):
    """One candidate in one cell. seconds: every sample, in the order taken. The rates and the share of the limit are
    those at the median. ratio: all but the baseline have one. first_seconds: making the candidate and its first run."""

    name: str
    seconds: list[float]
    median: float
    p20: float
    p80: float
    bytes_per_second: float
    flops_per_second: float
    ratio: Ratio
    fraction_of_limit: float
    first_seconds: float
    max_error: float | None


class Cell(TypedDict, total=False):
    """The result of one case. label: the table's columns and their values. work: a `roofline.Work`. limit: the least
    time that the machine allows, {seconds, by, bytes_per_second}. runs: the baseline first; empty if none was timed."""

    label: dict[str, Any]
    sizes: dict[str, Any]
    check: Check
    work: dict[str, int]
    limit: dict[str, Any]
    left_out: list[LeftOut]
    runs: list[Run]


class Record(TypedDict, total=False):
    """One run of a suite. machine: `machine.describe`. not_run: cases without a cell. failures: a line for each thing
    that went wrong beside the checks of cells."""

    suite: str
    date: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    limits: Limits
    cells: list[Any]
    not_run: list[NotRun]
    failures: list[str]


def write(record: Record, path: Path) -> None:
    """Write strict JSON; the folder is made if need be."""
    text = json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read(path: Path) -> Record:
    record: Record = json.loads(path.read_text(encoding="utf-8"))
    return record


def hardware(record: Record) -> str:
    """The machine's name as tables and plots give it."""
    machine, threads = record["machine"], record["settings"]["threads"]
    name: str = machine["gpu"]["name"] if "gpu" in machine else f"{machine['cpu']}, {counted(threads, 'thread')}"
    return f"DRY RUN on {name}" if record["settings"].get("dry") else name


def short(value: Any) -> str:
    """A label's value, short: 2.0 as 2."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def counted(count: int, thing: str, plural: str = "s") -> str:
    """ "1 thread", "2 threads"."""
    return f"{count} {thing}{'' if count == 1 else plural}"


def values(cell: Any) -> list[str]:
    """The values of a cell's label, as columns of a table."""
    return [short(value) for value in cell["label"].values()]


def title(label: dict[str, Any]) -> str:
    """ "model small, batch 1"."""
    return ", ".join(f"{column} {short(value)}" for column, value in label.items())
