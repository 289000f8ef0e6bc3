"""Devices and dtypes: which of them can be had here, why others cannot, and how much memory is left."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import psutil
import torch

from . import container
from .checks import short
from .errors import ArgumentError, BackendError

resource: ModuleType | None
try:
    import resource
except ImportError:  # Windows
    resource = None

KINDS = ("cuda", "mps", "cpu")  # of device, the best first
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def device_missing(kind: str) -> str | None:
    """Returns why there is no device of this kind, or None if there is one."""
    if kind == "cuda" and not torch.cuda.is_available():
        if torch.version.cuda is None and torch.version.hip is None:
            return f"torch {torch.__version__} was built without CUDA; install a CUDA build of torch"
        return "torch finds no CUDA device; check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES"
    if kind == "mps" and not torch.backends.mps.is_available():
        return "Apple's Metal is not available on this machine"
    return None


def triton_missing() -> str | None:
    """Returns why Triton cannot be used here, whatever the device, or None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; it comes with PyTorch for CUDA on Linux (pip install triton)"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton builds its launchers with a C compiler, and there is none; install gcc or clang, or set CC"
    return None


def check_device(device: str | torch.device, kinds: Sequence[str] = KINDS) -> torch.device:
    """Returns a device of these kinds that exists here, with its index where it has one.

    Raises ArgumentError for another kind, and BackendError for one that is not here.
    """
    try:
        out = torch.device(device)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise ArgumentError("device", "a torch device such as 'cpu' or 'cuda:0'", repr(device)) from error
    if out.type not in kinds:
        raise ArgumentError("device", f"a device of kind {', '.join(kinds[:-1])} or {kinds[-1]}", repr(str(out)))
    missing = device_missing(out.type)
    if missing is not None:
        raise BackendError(f"device {str(out)!r} cannot be used: {missing}")
    if out.type == "cuda":
        index = torch.cuda.current_device() if out.index is None else out.index
        if index >= torch.cuda.device_count():
            raise BackendError(
                f"device {str(out)!r} cannot be used: there are {torch.cuda.device_count()} CUDA devices"
            )
        out = torch.device("cuda", index)
    return out


def pick_device(name: str | None, kinds: Sequence[str] = KINDS) -> torch.device:
    """Returns the device of that name, or without one the best that is here.

    kinds: the kinds of device that serve, the best first. Raises ArgumentError or BackendError as `check_device`.
    """
    return check_device(next(kind for kind in kinds if device_missing(kind) is None) if name is None else name, kinds)


def check_dtype(dtype: object, device: torch.device) -> torch.dtype:
    """Returns a dtype that the engines compute in. Raises ArgumentError, or BackendError where the device lacks it."""
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:
        raise ArgumentError("dtype", "one of torch." + ", torch.".join(map(short, DTYPES)), repr(dtype))
    if device.type == "mps" and dtype == torch.float64:
        raise BackendError("dtype float64 cannot be used: Metal has none; use float32")
    if device.type == "cuda" and dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported():
        raise BackendError("dtype bfloat16 cannot be used: this GPU has none; use float16 or float32")
    return dtype


@contextmanager
def own_defaults() -> Iterator[None]:
    """Set torch's default dtype to fp32 and its default device to the CPU within this context.

    Modules are made by these defaults, whatever the process has set.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def free_memory(device: torch.device) -> int:
    """Returns the bytes that a new allocation on this device could get.

    Except on CUDA, that is what the machine has free, within what the container and `ulimit -v` still allow this
    process.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    bounds = (int(psutil.virtual_memory().available), container.free_memory(), _free_addresses())
    return min(bound for bound in bounds if bound is not None)


def _free_addresses() -> int | None:
    """Returns the bytes left of the address space that `ulimit -v` allows, or None without such a limit."""
    if resource is None or (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) == resource.RLIM_INFINITY:
        return None
    return max(0, limit - int(psutil.Process().memory_info().vms))


def usable_cores() -> int | None:
    """Returns the number of cores that this process may use, or None where it is not known.

    These are the cores that the process is bound to, but no more than its container grants.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    known = [each for each in (bound, _granted_cores()) if each is not None]
    return min(known, default=None)


@contextmanager
def torch_threads(number: int | None) -> Iterator[None]:
    """Makes torch compute with so many threads while the block runs; None leaves their number as it is."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def _granted_cores() -> int | None:
    return container.cores()


def default_threads() -> int:
    """Returns the number of threads of a native pass: as many as torch's, but no more than there are cores to run them.

    Threads meet after every product. Where two share a core, or all wait for the container's next share of time, each
    waits for the other.
    """
    cores = usable_cores()
    return torch.get_num_threads() if cores is None else min(torch.get_num_threads(), cores)
