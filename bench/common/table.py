"""Tables of plain text. A table is given by its columns, "header: format | header: format | …", and by parts of a
record, whose values are filled into the formats."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .record import counted, short

COLUMNS = (
    "run: {name} | seconds: {median:.4g} | p20-p80: {p20:.4g}-{p80:.4g} | n: {n} | faster: {faster} | "
    "GB/s: {gigabytes:.2f} | GFLOP/s: {gigaflops:.2f} | of limit: {fraction_of_limit:.1%} | max error: {error}"
)


def shown(part: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a part with what tables derive from it: the number of its samples, how many times faster than the
    baseline it was, its rates in units of 10⁹, its times in microseconds, and its error or why it has none."""
    found: dict[str, Any] = {"us": {name: 1e6 * part[name] for name in ("median", "p20", "p80") if name in part}}
    for unit in ("bytes", "flops"):
        found |= {f"giga{unit}": part[f"{unit}_per_second"] / 1e9} if f"{unit}_per_second" in part else {}
    if part.get("seconds"):
        found |= {"n": len(part["seconds"]), "faster": f"{part['ratio']['median']:.2f}x" if "ratio" in part else "1"}
    if part.get("max_error") is not None:
        found["error"] = f"{part['max_error']:.1e}"
    elif "reason" in part:
        found["error"] = part["reason"]
    return {**found, **part}


def table(columns: str, parts: Iterable[Mapping[str, Any]], left: int = 1) -> list[str]:
    """Returns the headers, and a line for each part, with "-" where that lacks a value. left: how many columns are
    names, which are aligned to the left."""

    def filled(form: str, part: Mapping[str, Any]) -> str:
        try:
            return form.format_map(part)
        except (KeyError, TypeError):  # a TypeError if the value is None
            return "-"

    headers, forms = zip(*(column.split(": ", 1) for column in columns.split(" | ")), strict=True)
    lines = [headers, *([filled(form, part) for form in forms] for part in map(shown, parts))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cells = [f"{{:{'<' if index < left else '>'}{width}}}" for index, width in enumerate(widths)]
    return ["  ".join(map(str.format, cells, line)).rstrip() for line in lines]


def labelled(columns: str, rows: Iterable[tuple[Any, Mapping[str, Any]]]) -> list[str]:
    """Returns a table that begins with the labels of cells. rows: cells, each with a part that a line shows."""
    rows = list(rows)
    parts = [{**part, **{name: short(value) for name, value in cell["label"].items()}} for cell, part in rows]
    labels = {name: f"{name}: {{{name}}}" for cell, _ in rows for name in cell["label"]}
    return table(" | ".join([*labels.values(), columns]), parts, len(labels) + 1)


def _parts(cell: Any) -> Iterator[Mapping[str, Any]]:
    if not cell["runs"]:
        yield {**cell["check"], "name": "FAILED"}
        return
    yield from ({**cell["check"], **run} for run in cell["runs"])
    yield from cell.get("left_out", [])


def _limit(name: str, limit: Any) -> str:
    """Returns a limit as text: a matrix rate, whose name has the dtype and the threads, or bandwidths by size."""
    what, threads = name.rsplit("_", 1) if name[-1].isdigit() else (name, "")
    head = what.replace("_", " ") + (f", {counted(int(threads), 'thread')}: " if threads else ": ")
    if not isinstance(limit, list):
        return f"{head}{limit / 1e9:.1f} GFLOP/s"
    return head + ", ".join(f"{at['bytes_per_second'] / 1e9:.1f} GB/s at {at['bytes'] / 2**20:.3g} MiB" for at in limit)


def cells_table(record: Any) -> list[str]:
    """Returns the lines that most suites print: the limits, what each run took, one line without times for a cell whose
    check failed."""
    rows = [(cell, part) for cell in record["cells"] for part in _parts(cell)]
    return [*(_limit(*limit) for limit in record["limits"].items()), "", *labelled(COLUMNS, rows)]
