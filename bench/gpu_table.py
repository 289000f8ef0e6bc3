"""What the table of a record of `bench gpu` has beside its cells: tests, launches, the inside of engines."""

from __future__ import annotations

from typing import Any

from .columns import aligned, short
from .cuda_table import comparison, inside, sanitizer_lines

Record = dict[str, Any]


def _micro(entry: dict[str, Any]) -> list[str]:
    """Median, and p20-p80, in microseconds."""
    return [f"{1e6 * entry['median']:.2f}", f"{1e6 * entry['p20']:.2f}-{1e6 * entry['p80']:.2f}"]


def _tests(record: Record) -> list[str]:
    tests = record["tests"]
    if tests is None:
        return ["tests:   not run"]
    verdict = "" if tests["ok"] else "  FAILED"
    return [f"tests:   {tests['passed']} passed, {tests['failed']} failed in {tests['seconds']:.0f} s{verdict}"]


def _launches(record: Record) -> list[str]:
    head = ["empty dependent launch", "µs", "p20-p80"]
    return aligned([head, *([entry["name"], *_micro(entry)] for entry in record["launches"])], 1)


def _engine(cell: dict[str, Any], bandwidth: float) -> list[str]:
    engine = cell["engine"]
    rows = [["", "µs", "p20-p80", "MB", "GB/s", "of limit"]]
    for entry in engine["operations"]:
        rate = entry["bytes_per_second"]
        rows.append(
            [
                entry["name"],
                *_micro(entry),
                f"{entry['bytes'] / 1e6:.3f}",
                f"{rate / 1e9:.1f}",
                f"{100 * rate / bandwidth:.1f}%",
            ]
        )
    moved = engine["bytes_per_step"]
    for entry in engine["steps"]:
        rate = moved / entry["median"]
        rows.append(
            [
                f"step, {entry['name']}",
                *_micro(entry),
                f"{moved / 1e6:.3f}",
                f"{rate / 1e9:.1f}",
                f"{100 * rate / bandwidth:.1f}%",
            ]
        )
    label = ", ".join(f"{column} {short(value)}" for column, value in cell["label"].items())
    head = f"kernels of {label}; {short(engine['launches_per_token'])} launches a token"
    return [head, *aligned(rows, 1), *(f"FAILED step, {reason}" for reason in engine["failed"])]


def _first_runs(record: Record) -> list[str]:
    """How long it takes until a contestant is ready and has run once: packing, compiling and tuning."""
    lines = ["first run, with all that is made for it, in seconds:"]
    for cell in record["cells"]:
        label = " ".join(short(value) for value in cell["label"].values())
        runs = ", ".join(f"{run['name']} {run['first_seconds']:.1f}" for run in cell["runs"])
        lines.append(f"  {label}: {runs or '-'}")
    return lines


def gpu_lines(record: Record) -> list[str]:
    """Lines to follow the table of cells."""
    lines = ["", *_tests(record), *sanitizer_lines(record)]
    lines += [f"{entry['name']}:    left out: {entry['reason']}" for entry in record.get("left_out", [])]
    lines += [*(f"FAILED {failure}" for failure in record["failures"]), "", *_launches(record)]
    lines += ["", *_first_runs(record)]
    bandwidth = record["limits"]["copy_bandwidth"][0]["bytes_per_second"]
    compared = comparison(record, bandwidth)
    lines += ["", *compared] if compared else []
    for cell in record["cells"]:
        if cell.get("engine"):
            lines += ["", *_engine(cell, bandwidth)]
        if cell.get("cuda"):
            lines += ["", *inside(cell)]
    return lines
