"""Tables of plain text, and the one that most suites print: a line for each run of each cell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .record import Cell, Record, values

COLUMNS = {
    "run": "{name}", "seconds": "{median:.4g}", "p20-p80": "{p20:.4g}-{p80:.4g}", "n": "{n}", "faster": "{faster}",
    "GB/s": "{gigabytes:.2f}", "GFLOP/s": "{gigaflops:.2f}", "of limit": "{fraction_of_limit:.1%}",
    "max error": "{error}",
}  # fmt: skip


def row(columns: Mapping[str, str], part: Mapping[str, Any]) -> list[str]:
    """A line of a table: for each column its format, filled in from a part of a record; "-" where that lacks it."""

    def filled(form: str) -> str:
        try:
            return form.format_map(part)
        except (KeyError, TypeError):  # a TypeError if it is None
            return "-"

    return list(map(filled, columns.values()))


def shown(run: Any) -> dict[str, Any]:
    """A run, if it was timed with the number of its samples, and "faster": the median of its ratios, or 1 for the
    baseline, which has none."""
    if not run["seconds"]:
        return dict(run)
    return {**run, "n": len(run["seconds"]), "faster": f"{run['ratio']['median']:.2f}x" if "ratio" in run else "1"}


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


def micro(part: Any) -> list[str]:
    """Median, and p20-p80, in microseconds."""
    low, middle, high = (1e6 * part[key] for key in ("p20", "median", "p80"))
    return [f"{middle:.2f}", f"{low:.2f}-{high:.2f}"]


def _error(check: Any) -> str:
    """check: a cell's, or a run with a check of its own."""
    return check["reason"] if check["max_error"] is None else f"{check['max_error']:.1e}"


def _rows(cell: Cell) -> Iterator[list[str]]:
    if not cell["runs"]:
        yield [*values(cell), *row(COLUMNS, {"name": "FAILED", "error": _error(cell["check"])})]
        return
    for run in cell["runs"]:
        rates = {"gigabytes": run["bytes_per_second"] / 1e9, "gigaflops": run["flops_per_second"] / 1e9}
        error = _error(run if "max_error" in run else cell["check"])
        yield [*values(cell), *row(COLUMNS, {**shown(run), **rates, "error": error})]
    for out in cell.get("left_out", []):
        yield [*values(cell), *row(COLUMNS, {"name": out["name"], "error": out["reason"]})]


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
    rows += [[*values(case), *row(COLUMNS, {"name": "not run", "error": case["reason"]})] for case in not_run]
    lines = aligned([[*labels, *COLUMNS], *rows], len(labels) + 1)
    return [f"limits:  {limits['matrix_flops_per_second'] / 1e9:.1f} GFLOP/s, {rates}", "", *lines]
