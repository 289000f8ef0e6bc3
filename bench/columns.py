"""Columns of plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def short(value: Any) -> str:
    """A label's value, short: 2.0 as 2."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def counted(count: int, thing: str, plural: str = "s") -> str:
    """ "1 thread", "2 threads"."""
    return f"{count} {thing}{'' if count == 1 else plural}"


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
