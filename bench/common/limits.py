"""What this machine can do at best, measured in the run that it is compared with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from . import roofline
from .harness import timer_of
from .machine import CPU
from .record import Cell, Limits

MATRIX_SIZE = 2048
GPU_MATRIX_SIZE = 8192
LARGE_BYTES = 512 * 2**20  # beyond every cache
SECONDS = 0.5  # spent on each measurement
ROW = 1024  # columns of the matrix that a read test multiplies
MATRIX_RATE = "matrix_flops_per_second"


def _best(run: Callable[[], object], device: torch.device = CPU) -> float:
    """The shortest of the runs that fit in SECONDS (three at least): a limit is a best case, not a median."""
    run()
    timer = timer_of(device)
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - started < SECONDS:
        times.append(timer(run))
    return min(times)


def matrix_rate(dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> float:
    """Operations per second of a large product, 2·n³ / seconds with torch's current threads.

    n is MATRIX_SIZE, or GPU_MATRIX_SIZE. dtype: fp32 or bf16. On a CPU the best of torch.mm and of oneDNN where torch
    has it: which BLAS suits a processor differs by factors.
    """
    n = MATRIX_SIZE if device.type == "cpu" else GPU_MATRIX_SIZE
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    seconds = _best(lambda: torch.mm(a, b), device)
    if device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        c, d = a.to_mkldnn(), b.to_mkldnn()
        seconds = min(seconds, _best(lambda: torch.nn.functional.linear(c, d)))
    return 2 * n**3 / seconds


def read_bandwidth(size: int) -> float:
    """Bytes per second at which a buffer of about `size` bytes is read over and over, cached or not as size decides.

    The best of its sums as fp32 and as fp64 values and of its product, as a (rows, ROW) matrix, with a vector: which
    one a processor is fastest at depends on the cache that they fit in, by factors. size: bytes, >= 4·ROW.
    """
    rows = size // (4 * ROW)
    matrix, vector = torch.ones(rows, ROW), torch.ones(ROW)
    seconds = min(_best(matrix.sum), _best(matrix.view(torch.float64).sum), _best(lambda: torch.mv(matrix, vector)))
    return 4 * rows * ROW / seconds


def copy_bandwidth(size: int, device: torch.device) -> float:
    """Bytes per second, read and written, of a copy of `size` bytes on the device."""
    source, target = torch.ones(2, size // 4, device=device)
    return 2 * 4 * source.numel() / _best(lambda: target.copy_(source), device)


def measure_gpu(device: torch.device) -> Limits:
    """The limits of a GPU: its bf16 rate, and the bandwidth of its memory, for which there is one size."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    size = max(LARGE_BYTES, 4 * cache)
    return {
        MATRIX_RATE: matrix_rate(torch.bfloat16, device),
        "copy_bandwidth": [{"bytes": size, "bytes_per_second": copy_bandwidth(size, device)}],
    }


def measure(sizes: Iterable[int]) -> Limits:
    """The limits of this CPU. sizes: bytes at which the read bandwidth is wanted beside LARGE_BYTES."""
    return {
        MATRIX_RATE: matrix_rate(),
        "read_bandwidth": [
            {"bytes": size, "bytes_per_second": read_bandwidth(size)} for size in sorted({*sizes, LARGE_BYTES})
        ],
    }


def best(first: Limits, second: Limits) -> Limits:
    """The higher of each rate of two measurements, such as before and after the cells: neighbours on a shared machine
    come and go, and a limit that was taken in a bad minute would be no limit. The second may lack some of the rates."""

    def higher(one: Any, other: Any) -> Any:
        if not isinstance(one, list):
            return max(one, other)
        return [max(pair, key=lambda entry: entry["bytes_per_second"]) for pair in zip(one, other, strict=True)]

    return {name: higher(rate, second.get(name, rate)) for name, rate in first.items()}


def bandwidth(limits: Limits, size: int) -> float:
    """A GPU's copy bandwidth, or a CPU's read bandwidth at exactly this size.

    Raises KeyError if `measure` was not asked for it.
    """
    if "copy_bandwidth" in limits:
        copied: float = limits["copy_bandwidth"][0]["bytes_per_second"]
        return copied
    rates: dict[int, float] = {entry["bytes"]: entry["bytes_per_second"] for entry in limits["read_bandwidth"]}
    return rates[size]


def hold_to_limit(cell: Cell, limits: Limits) -> None:
    """Give a cell its "limit", and each of its runs the share of it."""
    work = roofline.Work(**cell["work"])
    rates = (limits[MATRIX_RATE], bandwidth(limits, work.working_set))
    seconds = roofline.limit_seconds(work, *rates)
    cell["limit"] = {"seconds": seconds, "by": roofline.limited_by(work, *rates), "bytes_per_second": rates[1]}
    for run in cell["runs"]:
        run["fraction_of_limit"] = seconds / run["median"]
