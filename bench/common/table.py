"""Tables of plain text. A table is given by its columns, "header: format | header: format | …", and by parts of a
record, whose values are filled into the formats."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .record import Cell, Record, counted, short

COLUMNS = (
    "run: {name} | seconds: {median:.4g} | p20-p80: {p20:.4g}-{p80:.4g} | n: {n} | faster: {faster} | "
    "GB/s: {gigabytes:.2f} | GFLOP/s: {gigaflops:.2f} | of limit: {fraction_of_limit:.1%} | max error: {error}"
)
MICRO = ": {name} | µs: {us[median]:.2f} | p20-p80: {us[p20]:.2f}-{us[p80]:.2f}"


def shown(part: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a part with what tables derive from it: the number of its samples, how many times faster than the
    baseline it was, its rates in units of 10⁹, its times in microseconds, and its error or why it has none."""
    found: dict[str, Any] = {"us": {name: 1e6 * part[name] for name in ("median", "p20", "p80") if name in part}}
    for unit in ("bytes", "flops"):
        if f"{unit}_per_second" in part:
            found[f"giga{unit}"] = part[f"{unit}_per_second"] / 1e9
    if part.get("seconds"):
        found |= {"n": len(part["seconds"]), "faster": f"{part['ratio']['median']:.2f}x" if "ratio" in part else "1"}
    if part.get("max_error") is not None:
        found["error"] = f"{part['max_error']:.1e}"
    elif "reason" in part:
        found["error"] = part["reason"]
    return {**found, **part}


def table(columns: str, parts: Iterable[Mapping[str, Any]], left: int = 1, missing: str = "-") -> list[str]:
    """Returns the lines of a table: the headers, and a line for each part.

    left: how many of the columns are names, which are aligned to the left. missing: what stands where a part lacks a
    value.
    """

    def filled(form: str, part: Mapping[str, Any]) -> str:
        try:
            return form.format_map(part)
        except (KeyError, TypeError):  # a TypeError if the value is None
            return missing

    headers, forms = zip(*(column.split(": ", 1) for column in columns.split(" | ")), strict=True)
    lines = [headers, *([filled(form, part) for form in forms] for part in map(shown, parts))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cells = [f"{{:{'<' if index < left else '>'}{width}}}" for index, width in enumerate(widths)]
    return ["  ".join(map(str.format, cells, line)).rstrip() for line in lines]


def labelled(columns: str, rows: Iterable[tuple[Any, Mapping[str, Any]]]) -> list[str]:
    """Returns a table that begins with the labels of cells. rows: cells, each with a part that a line shows."""
    parts = [{**part, **{name: short(value) for name, value in cell["label"].items()}} for cell, part in rows]
    labels = {name: f"{name}: {{{name}}}" for cell, _ in rows for name in cell["label"]}
    return table(" | ".join([*labels.values(), columns]), parts, len(labels) + 1)


def _parts(cell: Cell) -> Iterator[Mapping[str, Any]]:
    if not cell["runs"]:
        yield {**cell["check"], "name": "FAILED"}
        return
    yield from ({**cell["check"], **run} for run in cell["runs"])
    yield from cell.get("left_out", [])


def cells_table(record: Record) -> list[str]:
    """Returns the lines that most suites print: the limits, and what each run took.

    A run has its seconds (median, p20-p80), samples, ratio to the baseline, rates, share of the limit, and the largest
    difference from the exact result. A cell whose check failed has one line without times. Below stand the matrix rates
    by dtype and threads where cells are held to several.
    """
    limits, rows = record["limits"], [(cell, part) for cell in record["cells"] for part in _parts(cell)]
    rows += [(case, {"name": "not run", "reason": case["reason"]}) for case in record.get("not_run", [])]
    bandwidths = [
        f"{size['bytes_per_second'] / 1e9:.1f} GB/s {verb} {size['bytes'] / 2**20:.3g} MiB"
        for name, verb in (("read_bandwidth", "from"), ("copy_bandwidth", "copying"))
        for size in limits.get(name, [])
    ]
    head = f"limits:  {limits['matrix_flops_per_second'] / 1e9:.1f} GFLOP/s, {', '.join(bandwidths)}"
    rates = [
        f"matrix rate, {dtype}, {counted(int(threads), 'thread')}: {rate / 1e9:.1f} GFLOP/s"
        for name, rate in limits.items()
        for dtype, _, threads in [name.partition("_flops_per_second_")]
        if threads
    ]
    return [head, "", *labelled(COLUMNS, rows), *([""] if rates else []), *rates]
