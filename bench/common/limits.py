"""What this machine can do at best, measured in the run that it is compared with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from tarflow_fast.devices import torch_threads

from . import roofline
from .harness import timer_of
from .machine import CPU
from .models import DTYPES
from .record import Limits

MATRIX_SIZE = 2048
GPU_MATRIX_SIZE = 8192
LARGE_BYTES = 512 * 2**20  # beyond every cache
SECONDS = 0.5  # spent on each measurement
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


def matrix_rate(dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> float:
    """Returns the operations per second of a large product, 2·n³ / seconds with torch's threads.

    On a CPU the best of torch.mm and of oneDNN where torch has it: which BLAS suits a processor differs by factors.
    """
    n = MATRIX_SIZE if device.type == "cpu" else GPU_MATRIX_SIZE
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    products: list[Callable[[], object]] = [lambda: torch.mm(a, b)]
    if device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        c, d = a.to_mkldnn(), b.to_mkldnn()
        products.append(lambda: torch.nn.functional.linear(c, d))
    return 2 * n**3 / fastest(*products, device=device)


def read_bandwidth(size: int) -> float:
    """Returns the bytes per second at which a buffer of about `size` bytes, >= 4·ROW, is read over and over.

    The best of its sums as fp32 and as fp64 values and of its product, as a (rows, ROW) matrix, with a vector: which
    one a processor is fastest at depends on the cache that they fit in, by factors.
    """
    rows = size // (4 * ROW)
    matrix, vector = torch.ones(rows, ROW), torch.ones(ROW)
    return 4 * rows * ROW / fastest(matrix.sum, matrix.view(torch.float64).sum, lambda: torch.mv(matrix, vector))


def measure_gpu(device: torch.device) -> Limits:
    """Returns the limits of a GPU: its bf16 rate, and the bandwidth, read and written, of a copy beyond its cache."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    size = max(LARGE_BYTES, 4 * cache)
    source, target = torch.ones(2, size // 4, device=device)
    rate = 8 * source.numel() / fastest(lambda: target.copy_(source), device=device)
    return {RATE: matrix_rate(torch.bfloat16, device), COPY: [{"bytes": size, "bytes_per_second": rate}]}


def measure(sizes: Iterable[int]) -> Limits:
    """Returns the limits of this CPU. sizes: bytes at which the read bandwidth is wanted beside LARGE_BYTES."""
    every = sorted({*sizes, LARGE_BYTES})
    return {RATE: matrix_rate(), READ: [{"bytes": size, "bytes_per_second": read_bandwidth(size)} for size in every]}


def _names(case: Any) -> tuple[str, str]:
    """Returns the names in a record of a case's matrix rate and read bandwidth; a case without threads has torch's."""
    dtype, threads = getattr(case, "dtype", "float32"), getattr(case, "threads", None)
    if threads is None:
        return RATE if dtype == "float32" else f"bf16_{RATE}", READ
    return f"{dtype}_flops_per_second_{threads}", f"{READ}_{threads}"


def of_cases(cases: Iterable[Any]) -> Limits:
    """Returns the limits of this CPU for cases, which have a dtype, threads and work; and those of fp32 with the last
    number of threads, for the table."""
    cases, last, found = list(cases), Limits(), Limits()
    for threads in dict.fromkeys(case.threads for case in cases):
        here = [case for case in cases if case.threads == threads]
        with torch_threads(threads):
            last = measure(size for case in here for size in (case.work.weight_bytes, case.work.working_set))
            for dtype, (rate, read) in {case.dtype: _names(case) for case in here}.items():
                found |= {rate: last[RATE] if dtype == "float32" else matrix_rate(DTYPES[dtype]), read: last[READ]}
    return {**last, **found}


def again(case: Any, found: Limits) -> Limits:
    """Returns a CPU's limits with the case's matrix rate measured once more, after it; a GPU's as they are."""
    if READ not in found:
        return found
    with torch_threads(case.threads):
        measured, same = matrix_rate(DTYPES[case.dtype]), found[_names(case)[0]]
    return best(found, {name: measured for name, rate in found.items() if rate == same})


def best(first: Limits, second: Limits) -> Limits:
    """Returns the higher of each rate of two measurements, of which the second may lack some: neighbours on a shared
    machine come and go, and a limit that was taken in a bad minute would be no limit."""

    def higher(one: Any, other: Any) -> Any:
        if not isinstance(one, list):
            return max(one, other)
        return [max(pair, key=lambda entry: entry["bytes_per_second"]) for pair in zip(one, other, strict=True)]

    return {name: higher(rate, second.get(name, rate)) for name, rate in first.items()}


def bandwidth(limits: Limits, size: int, name: str = READ) -> float:
    """Returns a GPU's copy bandwidth, or a CPU's read bandwidth at exactly this size, else raises KeyError."""
    if COPY in limits:
        return float(limits[COPY][0]["bytes_per_second"])
    return {entry["bytes"]: float(entry["bytes_per_second"]) for entry in limits[name]}[size]


def hold_to_limit(cell: Any, limits: Limits, case: Any = None) -> None:
    """Gives a cell its "limit", and each of its runs the share of it."""
    (rate, read), work = _names(case), roofline.Work(**cell["work"])
    reached = bandwidth(limits, work.working_set, read)
    seconds, by = roofline.limit(work, limits[rate], reached)
    cell["limit"] = {"seconds": seconds, "by": by, "bytes_per_second": reached}
    for run in cell["runs"]:
        run["fraction_of_limit"] = seconds / run["median"]
