"""What the table of `bench density` says besides: the matrix rates that its cells are held to."""

from __future__ import annotations

from typing import Any

from .columns import counted

RATE = "flops_per_second_"


def rate_name(dtype: str, threads: int) -> str:
    """In a record's limits: operations per second of a large product in this dtype, with so many threads."""
    return f"{dtype}_{RATE}{threads}"


def density_lines(record: dict[str, Any]) -> list[str]:
    lines = [""]
    for name, rate in record["limits"].items():
        dtype, found, threads = name.partition(f"_{RATE}")
        if found and threads:
            count = counted(int(threads), "thread")
            lines.append(f"matrix rate, {dtype}, {count}: {rate / 1e9:.1f} GFLOP/s")
    return lines
