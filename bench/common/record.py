"""A record is what a run of a suite leaves: one JSON file, {suite, date, machine, settings, limits, cells, failures}.
`machine.describe` says what a machine is; a suite describes the parts that its records alone have.

A cell is the result of one case, {label, sizes, check, work, limit, left_out, runs}. Its label holds the table's
columns and their values, its work is a `roofline.Work`, and its limit is the least time that the machine allows,
{seconds, by, bytes_per_second}. The baseline is the first of its runs; what was not timed is left out, {name, reason}.
A run is one candidate, {name, seconds, bytes_per_second, flops_per_second, ratio, fraction_of_limit, max_error} and a
spread: its seconds in the order taken, rates at their median, and the ratio of the baseline's seconds to them."""

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


class Check(TypedDict):
    """A check compares results. max_error is None where there is no number, reason where the check has passed."""

    passed: bool
    max_error: float | None
    tolerance: float | None
    reason: str | None


def write(record: Any, path: Path) -> None:
    """Writes strict JSON; the folder is made if need be."""
    text = json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def hardware(record: Any) -> str:
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


def title(label: dict[str, Any], between: str = ", ") -> str:
    """Returns a label as text, "model small, batch 1"."""
    return between.join(f"{column} {short(value)}" for column, value in label.items())
