"""Which backends there are, which can run here and why, and how one is made."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any
from weakref import WeakValueDictionary

import torch

from .. import devices
from ..checks import check_choice, check_count
from ..devices import device_missing
from ..errors import BackendError
from ..limits import most_threads
from ..native import choose_instruction_set
from ..scalars import check_flag
from .contract import BlockEngine
from .cpu_engine import CpuEngine, cpu_missing
from .cuda_engine import CudaEngine, cuda_missing, native_missing
from .fastest import Choices, FastestEngine
from .torch_engine import TorchEngine
from .weights import BlockWeights

BACKENDS = ("cpu", "torch", "triton", "cuda")
# What backend="auto" chooses from on a GPU. An engine belongs here once its tests and its bench have been run on one.
PROVEN_ON_GPU = ("torch",)


@dataclass(frozen=True)
class BackendStatus:
    """One backend on one kind of device: whether it can run here, and why, or why not and what would mend it."""

    name: str
    device: str
    available: bool
    reason: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def backends() -> list[BackendStatus]:
    """Every backend on every kind of device, best first, with the reason why it can or cannot run here."""
    found = []
    for kind in ("cuda", "mps", "cpu"):
        if kind == "cpu":
            found.append(_cpu_status())
        missing = device_missing(kind)
        if kind == "cuda":
            lacking = "; ".join(filter(None, (missing, native_missing()))) or None  # both, where both have to be mended
            found.append(_gpu_status("cuda", lambda: "one kernel a block", lacking))
            found.append(_gpu_status("triton", lambda: f"Triton {version('triton')}", missing))
        if missing is None:
            name = torch.cuda.get_device_name() if kind == "cuda" else kind
            found.append(BackendStatus("torch", kind, True, f"PyTorch {torch.__version__} on {name}"))
        else:
            found.append(BackendStatus("torch", kind, False, missing))
    return found


def _cpu_status() -> BackendStatus:
    try:
        missing = cpu_missing()
    except BackendError as error:
        missing = str(error)
    if missing is not None:
        return BackendStatus("cpu", "cpu", False, missing)
    why = f"native engine, {choose_instruction_set()}, {devices.default_threads()} threads; float32 and bfloat16"
    return BackendStatus("cpu", "cpu", True, why)


def _gpu_status(name: str, what: Callable[[], str], device_missing: str | None) -> BackendStatus:
    missing = device_missing or backend_missing(
        name, torch.device("cuda", torch.cuda.current_device()), torch.float32, False
    )
    if missing is not None:
        return BackendStatus(name, "cuda", False, missing)
    return BackendStatus(name, "cuda", True, f"{what()} on {torch.cuda.get_device_name()}{_unproven(name)}")


def _unproven(backend: str) -> str:
    return "" if backend in PROVEN_ON_GPU else "; to be asked for: not yet measured on a GPU"


def triton_missing(device: torch.device, dtype: torch.dtype = torch.float32, compile: bool = False) -> str | None:
    """Why the Triton engine cannot serve such a request, with the mend, or None if it can."""
    unusable = devices.triton_missing()
    if unusable is not None:
        return unusable
    from .triton_engine import triton_missing as missing

    return missing(device, dtype, compile)


def check_compile(compile: object, device: torch.device) -> bool:
    """Whether to compile, if that can be had. Raises ArgumentError, or BackendError without a compiler."""
    compile = check_flag("compile", compile)
    if compile and device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise BackendError("compile=True cannot be had: torch.compile needs a C++ compiler; install g++ or set CXX")
    return compile


def choose_backend(backend: str, device: torch.device, dtype: torch.dtype, compile: bool) -> tuple[str, str]:
    """(name, why) of the backend that serves this request. Raises BackendError if the one asked for cannot."""
    check_choice("backend", backend, ("auto", *BACKENDS))
    if backend == "cpu" and device.type != "cpu":
        raise BackendError(f"backend 'cpu' cannot run on {device}; use device='cpu', or backend='torch'")
    if backend != "auto":
        missing = backend_missing(backend, device, dtype, compile)
        if missing is not None:
            raise BackendError(f"backend {backend!r} cannot be had: {missing}")
        return backend, "asked for"
    if device.type == "cuda":
        able = _able(device, dtype, compile)
        if len(able) > 1:
            return "auto", f"the quickest of {', '.join(able)}, measured for each size of batch"
        missing = next((why for name in PROVEN_ON_GPU if (why := backend_missing(name, device, dtype, compile))), None)
        return able[0], missing or "the best that has been measured on a GPU; backend='triton' and 'cuda' have not"
    if device.type != "cpu":
        return "torch", f"the best available on {device.type}"
    missing = cpu_missing(dtype, compile)
    return ("cpu", "the best available on cpu") if missing is None else ("torch", missing)


def backend_missing(backend: str, device: torch.device, dtype: torch.dtype, compile: bool) -> str | None:
    """Why a backend cannot serve such a request, with the mend, or None if it can. Raises as `cpu_missing`."""
    if backend == "cpu":
        return cpu_missing(dtype, compile)
    if backend == "triton":
        return triton_missing(device, dtype, compile)
    if backend == "cuda":
        return cuda_missing(device, dtype, compile)
    return None


def _able(device: torch.device, dtype: torch.dtype, compile: bool) -> list[str]:
    """Those of PROVEN_ON_GPU that can serve such a request."""
    return [name for name in PROVEN_ON_GPU if backend_missing(name, device, dtype, compile) is None]


def check_threads(threads: object, backend: str) -> int | None:
    """The number of the `cpu` backend's threads, or None. Raises ArgumentError, or BackendError for other backends."""
    if threads is None:
        return None
    count = check_count("threads", threads, high=most_threads())
    if backend != "cpu":
        raise BackendError(
            f"threads is for backend 'cpu', and this is {backend!r}; leave threads out (OMP_NUM_THREADS tells PyTorch)"
        )
    return count


def make_engines(
    backend: str,
    blocks: Iterable[BlockWeights],
    *,
    device: torch.device,
    dtype: torch.dtype,
    compile: bool,
    threads: int | None = None,
) -> list[BlockEngine]:
    """The engines of a model's flow blocks; `backend` is a name that `choose_backend` gave, and "auto" is the quickest
    of several. threads: see `check_threads`."""
    if backend != "auto":
        make = _maker(backend, device, dtype, compile, threads)
        return [make(weights) for weights in blocks]
    makers = {name: _maker(name, device, dtype, compile, threads) for name in _able(device, dtype, compile)}
    choices = Choices()
    return [
        FastestEngine({name: functools.partial(make, weights) for name, make in makers.items()}, dtype, choices)
        for weights in blocks
    ]


def _maker(
    backend: str, device: torch.device, dtype: torch.dtype, compile: bool, threads: int | None
) -> Callable[[BlockWeights], BlockEngine]:
    """What makes the engine of each flow block of one model."""
    if backend == "cpu":
        return functools.partial(CpuEngine, dtype=dtype, threads=threads)
    if backend == "triton":
        from .triton_engine import TritonEngine
        from .triton_workspace import Pool

        pools: WeakValueDictionary[str, Pool] = WeakValueDictionary()  # one, kept by the engines that share it

        def make(weights: BlockWeights) -> BlockEngine:
            pool = pools.setdefault(backend, Pool())
            return TritonEngine(weights, device=device, dtype=dtype, pool=pool)

        return make
    if backend == "cuda":
        return functools.partial(CudaEngine, device=device, dtype=dtype)
    return functools.partial(TorchEngine, device=device, dtype=dtype, compile=compile)
