"""Tables of plain text, and the one that most suites print: a line for each run of each cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .record import Cell, Record, values

COLUMNS = ["run", "seconds", "p20-p80", "n", "faster", "GB/s", "GFLOP/s", "of limit", "max error"]


def aligned(lines: Sequence[Sequence[str]], left: int) -> list[str]:
    """One string a line: the first `left` columns, which are names, to the left, figures to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def times(run: Any, form: str = ".4g") -> list[str]:
    """Median, p20-p80 and number of samples, in seconds; form: of the percentiles."""
    return [f"{run['median']:.4g}", f"{run['p20']:{form}}-{run['p80']:{form}}", str(len(run["seconds"]))]


def micro(part: Any) -> list[str]:
    """Median, and p20-p80, in microseconds."""
    low, middle, high = (1e6 * part[key] for key in ("p20", "median", "p80"))
    return [f"{middle:.2f}", f"{low:.2f}-{high:.2f}"]


def faster(run: Any) -> str:
    """The median of a run's ratios; 1 for the baseline, which has none."""
    return f"{run['ratio']['median']:.2f}x" if "ratio" in run else "1"


def _error(check: Any) -> str:
    """check: a cell's, or a run with a check of its own."""
    return check["reason"] if check["max_error"] is None else f"{check['max_error']:.1e}"


def _rows(cell: Cell) -> list[list[str]]:
    label, runs = values(cell), cell["runs"]
    blank = ["-"] * 7
    if not runs:
        return [[*label, "FAILED", *blank, _error(cell["check"])]]
    rows = []
    for run in runs:
        rates = [f"{run[rate] / 1e9:.2f}" for rate in ("bytes_per_second", "flops_per_second")]
        error = _error(run if "max_error" in run else cell["check"])
        share = f"{100 * run['fraction_of_limit']:.1f}%"
        rows.append([*label, run["name"], *times(run), faster(run), *rates, share, error])
    return rows + [[*label, out["name"], *blank, out["reason"]] for out in cell.get("left_out", [])]


def cells_table(record: Record) -> list[str]:
    """The limits, and a line for each run: seconds (median, p20-p80), samples, ratio to the baseline, rates, share of
    the limit, and the largest difference from the exact result. A cell whose check failed has one line, without times.
    """
    limits, not_run = record["limits"], record.get("not_run", [])
    rates = ", ".join(
        f"{size['bytes_per_second'] / 1e9:.1f} GB/s {verb} {size['bytes'] / 2**20:.3g} MiB"
        for name, verb in (("read_bandwidth", "from"), ("copy_bandwidth", "copying"))
        for size in limits.get(name, [])
    )
    labels = list([*record["cells"], *not_run][0]["label"])
    rows = [row for cell in record["cells"] for row in _rows(cell)]
    rows += [[*values(case), "not run", *["-"] * 7, case["reason"]] for case in not_run]
    lines = aligned([[*labels, *COLUMNS], *rows], len(labels) + 1)
    return [f"limits:  {limits['matrix_flops_per_second'] / 1e9:.1f} GFLOP/s, {rates}", "", *lines]
