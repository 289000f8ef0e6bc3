"""What this machine can do at best, measured in the run that it is compared with."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from tarflow_fast.devices import torch_threads

from . import roofline
from .harness import Case, timer_of
from .machine import CPU
from .models import DTYPES
from .record import Limits

MATRIX_SIZE, GPU_MATRIX_SIZE = 2048, 8192
LARGE_BYTES = 512 * 2**20  # beyond every cache
SECONDS = 0.2  # spent on each measurement, of which each case has its own
ROW = 1024  # columns of the matrix that a read test multiplies
RATE, READ, COPY = "matrix_flops_per_second", "read_bandwidth", "copy_bandwidth"


def fastest(*runs: Callable[[], object], device: torch.device = CPU) -> float:
    """Returns the shortest run of those that fit in SECONDS, three at least of each: a limit is a best case."""
    times: list[float] = []
    for run in runs:
        run()
        started, enough = time.perf_counter(), len(times) + 3
        while len(times) < enough or time.perf_counter() - started < SECONDS:
            times.append(timer_of(device)(run))
    return min(times)


def square_products(
    dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> tuple[int, list[Callable[[], object]]]:
    """Returns the operations of a large product, 2·n³, and the ways to compute it: torch.mm, and oneDNN where torch has
    it for a CPU, as which BLAS suits a processor differs by factors."""
    n = MATRIX_SIZE if device.type == "cpu" else GPU_MATRIX_SIZE
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    products: list[Callable[[], object]] = [lambda: torch.mm(a, b)]
    if device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        c, d = a.to_mkldnn(), b.to_mkldnn()
        products.append(lambda: torch.nn.functional.linear(c, d))
    return 2 * n**3, products


def matrix_rate(dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> float:
    """Returns the operations per second of a large product with torch's threads, computed in the fastest way."""
    flops, products = square_products(dtype, device)
    return flops / fastest(*products, device=device)


def reads(size: int) -> tuple[int, list[Callable[[], object]]]:
    """Returns the bytes of a buffer of about `size` bytes, >= 4·ROW, and the ways to read it: its sums as fp32 and as
    fp64 values, and its product, as a (rows, ROW) matrix, with a vector. Which one a processor is fastest at depends on
    the cache that they fit in, by factors."""
    rows = size // (4 * ROW)
    matrix, vector = torch.ones(rows, ROW), torch.ones(ROW)
    return 4 * rows * ROW, [matrix.sum, matrix.view(torch.float64).sum, lambda: torch.mv(matrix, vector)]


def read_bandwidth(size: int) -> float:
    """Returns the bytes per second at which a buffer of `size` bytes is read over and over in the fastest way."""
    read, ways = reads(size)
    return read / fastest(*ways)


def measure_gpu(device: torch.device) -> Limits:
    """Returns the limits of a GPU: its bf16 rate, and the bandwidth, read and written, of a copy beyond its cache."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    size = max(LARGE_BYTES, 4 * cache)
    source, target = torch.ones(2, size // 4, device=device)
    rate = 8 * source.numel() / fastest(lambda: target.copy_(source), device=device)
    return {RATE: matrix_rate(torch.bfloat16, device), COPY: [{"bytes": size, "bytes_per_second": rate}]}


def _names(case: Case) -> tuple[str, str]:
    threads = case.threads or torch.get_num_threads()
    return f"{case.dtype}_flops_per_second_{threads}", f"{READ}_{threads}"


def measure(case: Case) -> Limits:
    """Returns what a case is held to on a CPU: the matrix rate of its dtype, and the bandwidth at its working set."""
    (rate, read), size = _names(case), case.work.working_set
    with torch_threads(case.threads):
        entry = {"bytes": size, "bytes_per_second": read_bandwidth(size)}
        return {rate: matrix_rate(DTYPES[case.dtype]), read: [entry]}


def best(first: Limits, second: Limits) -> Limits:
    """Returns the higher of each rate of two measurements, by size where it has one: neighbours on a shared machine
    come and go, and a limit that was taken in a bad minute would be no limit."""

    def higher(one: Any, other: Any) -> Any:
        if not isinstance(one, list):
            return max(one, other)
        ranked = sorted([*one, *other], key=lambda entry: (entry["bytes"], entry["bytes_per_second"]))
        return list({entry["bytes"]: entry for entry in ranked}.values())

    return {**first, **{name: higher(first.get(name, rate), rate) for name, rate in second.items()}}


def hold(cell: Any, limits: Limits, case: Case) -> None:
    """Gives a cell its "limit", and each of its runs the share of it."""
    rate, read = (RATE, COPY) if COPY in limits else _names(case)
    sizes = {entry["bytes"]: entry["bytes_per_second"] for entry in limits[read]}
    reached = max(sizes.values()) if read == COPY else sizes[case.work.working_set]
    seconds, by = roofline.limit(case.work, limits[rate], reached)
    cell["limit"] = {"seconds": seconds, "by": by, "bytes_per_second": reached}
    for run in cell["runs"]:
        run["fraction_of_limit"] = seconds / run["median"]
