"""One JSON per run, and the table that is read off it.

A record has "suite", "date", "machine", "settings", "limits" (`limits.measure`) and "cells". A cell has
"label" {column: value}, "check" {passed, max_error, tolerance, reason}, "work" (`roofline.Work`), "limit"
{seconds, by, bytes_per_second}, and "runs", empty if the check failed. A run has "name", "seconds" (every sample, in
the order taken), their "median", "p20", "p80", and "fraction_of_limit", "bytes_per_second", "flops_per_second" at the
median; all but the first, the baseline, have "ratio" {samples, median, p20, p80}: baseline / run, round by round.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .roofline import Work
from .timing import pairwise_ratios, spread

Record = dict[str, Any]


def runs(samples: dict[str, list[float]], work: Work) -> list[dict[str, Any]]:
    """The "runs" of a cell. samples: seconds by name, the baseline first."""
    baseline = next(iter(samples))
    out = []
    for name, seconds in samples.items():
        run: dict[str, Any] = {"name": name, "seconds": seconds, **spread(seconds)}
        run["bytes_per_second"] = work.bytes / run["median"]
        run["flops_per_second"] = work.flops / run["median"]
        if name != baseline:
            ratios = pairwise_ratios(samples[baseline], seconds)
            run["ratio"] = {"samples": ratios, **spread(ratios)}
        out.append(run)
    return out


def write(record: Record, path: Path) -> None:
    """As strict JSON; the folder is made if need be."""
    text = json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def read(path: Path) -> Record:
    record: Record = json.loads(path.read_text(encoding="utf-8"))
    return record


def short(value: Any) -> str:
    """A label's value, short: 2.0 as 2."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def threads(record: Record) -> str:
    count = record["settings"]["threads"]
    return f"{count} thread{'' if count == 1 else 's'}"


def _error(check: dict[str, Any]) -> str:
    return check["reason"] if check["max_error"] is None else f"{check['max_error']:.1e}"


def _rows(record: Record) -> list[list[str]]:
    rows = []
    for cell in record["cells"]:
        label = [short(value) for value in cell["label"].values()]
        if not cell["runs"]:
            rows.append([*label, "FAILED", *["-"] * 7, _error(cell["check"])])
        for run in cell["runs"]:
            ratio = run.get("ratio")
            rows.append(
                [
                    *label,
                    run["name"],
                    f"{run['median']:.4g}",
                    f"{run['p20']:.4g}-{run['p80']:.4g}",
                    str(len(run["seconds"])),
                    "1" if ratio is None else f"{ratio['median']:.2f}x",
                    f"{run['bytes_per_second'] / 1e9:.2f}",
                    f"{run['flops_per_second'] / 1e9:.2f}",
                    f"{100 * run['fraction_of_limit']:.1f}%",
                    _error(cell["check"]),
                ]
            )
    return rows


def table(record: Record) -> str:
    """Plain text, one line a run: seconds (median, p20-p80), samples, ratio to the baseline, rates, share of the limit.

    A cell whose check failed has one line without times. The last column is the largest difference from the baseline.
    """
    labels = list(record["cells"][0]["label"])
    head = [*labels, "run", "seconds", "p20-p80", "n", "faster", "GB/s", "GFLOP/s", "of limit", "max error"]
    lines = [head, *_rows(record)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    left = len(labels) + 1  # names to the left, figures to the right
    rows = [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    machine, limits = record["machine"], record["limits"]
    rates = ", ".join(
        f"{size['bytes_per_second'] / 1e9:.1f} GB/s from {size['bytes'] / 2**20:.3g} MiB"
        for size in limits["read_bandwidth"]
    )
    return "\n".join(
        [
            f"machine: {machine['cpu']}, {threads(record)}, {machine['os']}",
            f"limits:  {limits['matrix_flops_per_second'] / 1e9:.1f} GFLOP/s, {rates}",
            "",
            *rows,
        ]
    )
