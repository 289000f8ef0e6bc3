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
from .record import Cell, Limits

MATRIX_SIZE = 2048
GPU_MATRIX_SIZE = 8192
LARGE_BYTES = 512 * 2**20  # beyond every cache
SECONDS = 0.5  # spent on each measurement
ROW = 1024  # columns of the matrix that a read test multiplies
MATRIX_RATE = "matrix_flops_per_second"


def _best(run: Callable[[], object], device: torch.device = CPU) -> float:
    """Returns the shortest of the runs that fit in SECONDS (three at least): a limit is a best case, no median."""
    run()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - started < SECONDS:
        times.append(timer_of(device)(run))
    return min(times)


def matrix_rate(dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> float:
    """Returns the operations per second of a large product in fp32 or bf16, 2·n³ / seconds with torch's threads.

    On a CPU the best of torch.mm and of oneDNN where torch has it: which BLAS suits a processor differs by factors.
    """
    n = MATRIX_SIZE if device.type == "cpu" else GPU_MATRIX_SIZE
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    seconds = _best(lambda: torch.mm(a, b), device)
    if device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        c, d = a.to_mkldnn(), b.to_mkldnn()
        seconds = min(seconds, _best(lambda: torch.nn.functional.linear(c, d)))
    return 2 * n**3 / seconds


def read_bandwidth(size: int) -> float:
    """Returns the bytes per second at which a buffer of about `size` bytes is read over and over, cached or not.

    The best of its sums as fp32 and as fp64 values and of its product, as a (rows, ROW) matrix, with a vector: which
    one a processor is fastest at depends on the cache that they fit in, by factors. size: bytes, >= 4·ROW.
    """
    rows = size // (4 * ROW)
    matrix, vector = torch.ones(rows, ROW), torch.ones(ROW)
    seconds = min(_best(matrix.sum), _best(matrix.view(torch.float64).sum), _best(lambda: torch.mv(matrix, vector)))
    return 4 * rows * ROW / seconds


def measure_gpu(device: torch.device) -> Limits:
    """Returns the limits of a GPU: its bf16 rate, and the bandwidth, read and written, of a copy beyond its cache."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    size = max(LARGE_BYTES, 4 * cache)
    source, target = torch.ones(2, size // 4, device=device)
    copied = {"bytes": size, "bytes_per_second": 8 * source.numel() / _best(lambda: target.copy_(source), device)}
    return {MATRIX_RATE: matrix_rate(torch.bfloat16, device), "copy_bandwidth": [copied]}


def measure(sizes: Iterable[int]) -> Limits:
    """Returns the limits of this CPU. sizes: bytes at which the read bandwidth is wanted beside LARGE_BYTES."""
    every = sorted({*sizes, LARGE_BYTES})
    read = [{"bytes": size, "bytes_per_second": read_bandwidth(size)} for size in every]
    return {MATRIX_RATE: matrix_rate(), "read_bandwidth": read}


def names(dtype: str, threads: int | None) -> tuple[str, str]:
    """Returns the names in a record's limits of the matrix rate and of the read bandwidth; threads: None for torch's
    own, where these do not vary."""
    if threads is None:
        return MATRIX_RATE if dtype == "float32" else "bf16_matrix_flops_per_second", "read_bandwidth"
    return f"{dtype}_flops_per_second_{threads}", f"read_bandwidth_{threads}"


def of_cases(cases: Iterable[Any]) -> Limits:
    """Returns the limits of this CPU for cases, which have a dtype, threads and work; and those of fp32 with the last
    number of threads, for the table."""
    cases = list(cases)
    found: Limits = {}
    for threads in dict.fromkeys(case.threads for case in cases):
        here = [case for case in cases if case.threads == threads]
        with torch_threads(threads):
            measured = measure(size for case in here for size in (case.work.weight_bytes, case.work.working_set))
            for dtype in dict.fromkeys(case.dtype for case in here):
                rate = measured[MATRIX_RATE] if dtype == "float32" else matrix_rate(DTYPES[dtype])
                found |= dict(zip(names(dtype, threads), (rate, measured["read_bandwidth"]), strict=True))
    return {**measured, **found}


def again(case: Any, found: Limits) -> Limits:
    """Returns the limits found, with the case's matrix rate measured once more, after it."""
    if "read_bandwidth" not in found:
        return found
    name, _ = names(case.dtype, case.threads)
    with torch_threads(case.threads):
        rate = matrix_rate(DTYPES[case.dtype])
    same = [each for each in (name, MATRIX_RATE) if found[each] == found[name]]
    return best(found, dict.fromkeys(same, rate))


def best(first: Limits, second: Limits) -> Limits:
    """Returns the higher of each rate of two measurements, such as before and after the cells: neighbours on a shared
    machine come and go, and a limit that was taken in a bad minute would be no limit. The second may lack some."""

    def higher(one: Any, other: Any) -> Any:
        if not isinstance(one, list):
            return max(one, other)
        return [max(pair, key=lambda entry: entry["bytes_per_second"]) for pair in zip(one, other, strict=True)]

    return {name: higher(rate, second.get(name, rate)) for name, rate in first.items()}


def bandwidth(limits: Limits, size: int) -> float:
    """Returns a GPU's copy bandwidth, or a CPU's read bandwidth at exactly this size, else raises KeyError."""
    if "copy_bandwidth" in limits:
        return float(limits["copy_bandwidth"][0]["bytes_per_second"])
    return {entry["bytes"]: float(entry["bytes_per_second"]) for entry in limits["read_bandwidth"]}[size]


def of_case(case: Any, found: Limits) -> Limits:
    """Returns the limits that a case is held to."""
    if "read_bandwidth" not in found:
        return found
    rate, read = names(case.dtype, case.threads)
    return {MATRIX_RATE: found[rate], "read_bandwidth": found[read]}


def hold_to_limit(cell: Cell, limits: Limits) -> None:
    """Gives a cell its "limit", and each of its runs the share of it."""
    work = roofline.Work(**cell["work"])
    rates = (limits[MATRIX_RATE], bandwidth(limits, work.working_set))
    seconds = roofline.limit_seconds(work, *rates)
    cell["limit"] = {"seconds": seconds, "by": roofline.limited_by(work, *rates), "bytes_per_second": rates[1]}
    for run in cell["runs"]:
        run["fraction_of_limit"] = seconds / run["median"]
