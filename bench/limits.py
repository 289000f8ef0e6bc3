"""What this machine can do at best, measured in the run that it is compared with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

MATRIX_SIZE = 2048
LARGE_BYTES = 512 * 2**20  # beyond every cache
SECONDS = 0.5  # spent on each measurement
ROW = 1024  # columns of the matrix that a read test multiplies


def _best(run: Callable[[], object]) -> float:
    """The shortest of the runs that fit in SECONDS (three at least): a limit is a best case, not a median."""
    run()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - started < SECONDS:
        before = time.perf_counter()
        run()
        times.append(time.perf_counter() - before)
    return min(times)


def matrix_rate(dtype: torch.dtype = torch.float32) -> float:
    """Operations per second of a large product, 2·n³ / seconds with n = MATRIX_SIZE and torch's current threads.

    dtype: fp32 or bf16.
    The best of torch.mm and of oneDNN where torch has it: which BLAS suits a processor differs by factors.
    """
    a, b = torch.randn(2, MATRIX_SIZE, MATRIX_SIZE).to(dtype)
    seconds = _best(lambda: torch.mm(a, b))
    if dtype == torch.float32 and torch.backends.mkldnn.is_available():
        c, d = a.to_mkldnn(), b.to_mkldnn()
        seconds = min(seconds, _best(lambda: torch.nn.functional.linear(c, d)))
    return 2 * MATRIX_SIZE**3 / seconds


def read_bandwidth(size: int) -> float:
    """Bytes per second at which a buffer of about `size` bytes is read over and over, cached or not as size decides.

    The best of its sums as fp32 and as fp64 values and of its product, as a (rows, ROW) matrix, with a vector: which
    one a processor is fastest at depends on the cache that they fit in, by factors. size: bytes, >= 4·ROW.
    """
    rows = size // (4 * ROW)
    matrix, vector = torch.ones(rows, ROW), torch.ones(ROW)
    seconds = min(_best(matrix.sum), _best(matrix.view(torch.float64).sum), _best(lambda: torch.mv(matrix, vector)))
    return 4 * rows * ROW / seconds


def measure(sizes: Iterable[int]) -> dict[str, Any]:
    """The record of this machine's limits. sizes: bytes at which the read bandwidth is wanted beside LARGE_BYTES."""
    return {
        "matrix_flops_per_second": matrix_rate(),
        "read_bandwidth": [
            {"bytes": size, "bytes_per_second": read_bandwidth(size)} for size in sorted({*sizes, LARGE_BYTES})
        ],
    }


def best(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The higher of each rate of two measurements, such as before and after the cells: neighbours on a shared machine
    come and go, and a limit that was taken in a bad minute would be no limit."""
    merged = {name: max(rate, second[name]) for name, rate in first.items() if name != "read_bandwidth"}
    merged["read_bandwidth"] = [
        {"bytes": a["bytes"], "bytes_per_second": max(a["bytes_per_second"], b["bytes_per_second"])}
        for a, b in zip(first["read_bandwidth"], second["read_bandwidth"], strict=True)
    ]
    return merged


def bandwidth(limits: dict[str, Any], size: int) -> float:
    """The measured read bandwidth at exactly this size. Raises KeyError if `measure` was not asked for it."""
    rates: dict[int, float] = {entry["bytes"]: entry["bytes_per_second"] for entry in limits["read_bandwidth"]}
    return rates[size]
