"""One JSON per run, and the table that is read off it.

A record has "suite", "date", "machine", "settings", "limits" (`limits.measure`) and "cells". A cell has
"label" {column: value}, "check" {passed, max_error, tolerance, reason}, "work" (`roofline.Work`), "limit"
{seconds, by, bytes_per_second}, and "runs", empty if the check failed. A run has "name", "seconds" (every sample, in
the order taken), their "median", "p20", "p80", and "fraction_of_limit", "bytes_per_second", "flops_per_second" at the
median; all but the first, the baseline, have "ratio" {samples, median, p20, p80}: baseline / run, round by round.

A suite whose contestants are checked one by one (`trials.measure_trials`) has in a cell "left_out", [{name, reason}],
and in a run "first_seconds" and its own "max_error". A suite with a budget has "not_run", [{label, reason}], of cells.
That of GPUs has besides "tests" (`gpu_tests.run_tests`) or None, "launches" (`launches.measure_launches`), "failures",
a line for each part that could not be done, and in its sampling cells "engine" (`engine_parts.measure_engine`) or None;
of its limits see `limits.measure_gpu`. Records with the CUDA engine have "sanitizer" (`cuda_sanitize.run_sanitizer`) or
None, "left_out", [{name, reason}], of contestants in all cells, and where that engine takes part in sampling cells
"cuda" (`cuda_parts.measure_cuda`) or None.

That of solvers has no limits, and "failures" as above; a cell, one block, has besides "tokens", "largest", the largest
|x| of the sequential result, and "jacobi_errors" (`solver_cells.jacobi_errors`). Its runs have what
`solver_cells.examine` gives, adaptive's also "jacobi_evaluations", what all-Jacobi evaluates until its error is no
larger. They are there if the check failed too, with no "seconds".

That of auto has no limits, and "failures" as above; a cell, one batch, has besides "backend", "tokens", "costs" (of a
token and of passes by width: as auto measured them, and measured again), "settling" {settled, runs: [{seconds, setup,
windows}]} of auto, "first" (its first run / sequential's median), "left_out" and "not_run", [{name, reason}] of
contestants, and "verdict" (`auto_cells.judge`), None if sequential or auto failed. Its runs have besides "passes",
"evaluations" (for each image), "max_error" and "blocks" (`BlockReport`, by block); those too slow for the rounds have
the seconds of their first runs and no "ratio". They are there if the check failed too.

That of load has no limits and no work; a cell, a task at a number of threads, has besides "fair"
(`busy.fair_slowdown`), "over_fair", the median slowdown over that, and "over_spin", its spread over the yardstick's,
round by round. Its runs are "quiet", "busy", "spin quiet" and "spin busy", in seconds of one call; the busy ones have
"slowdown" {samples, median, p20, p80} in place of "ratio".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tarflow_fast.files import replacing

from .auto_table import auto_lines
from .columns import aligned, counted, short
from .density_table import density_lines
from .gpu_table import gpu_lines
from .load_table import load_lines
from .roofline import Work
from .solver_table import solver_lines
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
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read(path: Path) -> Record:
    record: Record = json.loads(path.read_text(encoding="utf-8"))
    return record


def threads(record: Record) -> str:
    return counted(record["settings"]["threads"], "thread")


def hardware(record: Record) -> str:
    machine = record["machine"]
    name: str = machine["gpu"]["name"] if "gpu" in machine else f"{machine['cpu']}, {threads(record)}"
    return f"DRY RUN on {name}" if record["settings"].get("dry") else name


def _error(check: dict[str, Any]) -> str:
    """check: a cell's, or a run with a check of its own."""
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
                    _error(run if "max_error" in run else cell["check"]),
                ]
            )
        if cell["runs"]:
            rows += [[*label, out["name"], *["-"] * 7, out["reason"]] for out in cell.get("left_out", [])]
    for cell in record.get("not_run", []):
        rows.append([*map(short, cell["label"].values()), "not run", *["-"] * 7, cell["reason"]])
    return rows


def table(record: Record) -> str:
    """Plain text, one line a run: seconds (median, p20-p80), samples, ratio to the baseline, rates, share of the limit.

    A cell whose check failed has one line without times. The last column is the largest difference from the baseline.
    """
    machine = f"machine: {hardware(record)}, {record['machine']['os']}"
    if record["suite"] == "solver":
        return "\n".join([machine, *solver_lines(record)])
    if record["suite"] == "auto":
        return "\n".join([machine, *auto_lines(record)])
    if record["suite"] == "load":
        return "\n".join([machine, *load_lines(record)])
    labels = list([*record["cells"], *record.get("not_run", [])][0]["label"])
    head = [*labels, "run", "seconds", "p20-p80", "n", "faster", "GB/s", "GFLOP/s", "of limit", "max error"]
    lines = [head, *_rows(record)]
    limits = record["limits"]
    rates = ", ".join(
        f"{size['bytes_per_second'] / 1e9:.1f} GB/s {verb} {size['bytes'] / 2**20:.3g} MiB"
        for name, verb in (("read_bandwidth", "from"), ("copy_bandwidth", "copying"))
        for size in limits.get(name, [])
    )
    return "\n".join(
        [
            machine,
            f"limits:  {limits['matrix_flops_per_second'] / 1e9:.1f} GFLOP/s, {rates}",
            "",
            *aligned(lines, len(labels) + 1),
            *(gpu_lines(record) if record["suite"] == "gpu" else []),
            *(density_lines(record) if record["suite"] == "density" else []),
        ]
    )
