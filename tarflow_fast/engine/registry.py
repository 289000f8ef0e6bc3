"""Which backends there are, which can run here and why, and how one is made."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..checks import check_choice, short
from ..errors import ArgumentError, BackendError
from .contract import BlockEngine
from .torch_engine import TorchEngine
from .weights import BlockWeights

BACKENDS = ("torch",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class BackendStatus:
    """One backend on one kind of device: whether it can run here, and why, or why not and what would mend it."""

    name: str
    device: str
    available: bool
    reason: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _device_missing(kind: str) -> str | None:
    """Why there is no device of this kind, or None if there is one."""
    if kind == "cuda" and not torch.cuda.is_available():
        if torch.version.cuda is None and torch.version.hip is None:
            return f"torch {torch.__version__} was built without CUDA; install a CUDA build of torch"
        return "torch finds no CUDA device; check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES"
    if kind == "mps" and not torch.backends.mps.is_available():
        return "Apple's Metal is not available on this machine"
    return None


def backends() -> list[BackendStatus]:
    """Every backend on every kind of device, best first, with the reason why it can or cannot run here."""
    found = []
    for kind in ("cuda", "mps", "cpu"):
        missing = _device_missing(kind)
        if missing is None:
            name = torch.cuda.get_device_name() if kind == "cuda" else kind
            found.append(BackendStatus("torch", kind, True, f"PyTorch {torch.__version__} on {name}"))
        else:
            found.append(BackendStatus("torch", kind, False, missing))
    return found


def check_device(device: str | torch.device) -> torch.device:
    """A device that exists here, with its index where it has one. Raises ArgumentError or BackendError."""
    try:
        out = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError("device", "a torch device such as 'cpu' or 'cuda:0'", repr(device)) from error
    if out.type not in ("cpu", "cuda", "mps"):
        raise ArgumentError("device", "a device of kind cpu, cuda or mps", repr(str(out)))
    missing = _device_missing(out.type)
    if missing is not None:
        raise BackendError(f"device {str(out)!r} cannot be used: {missing}")
    if out.type == "cuda":
        index = torch.cuda.current_device() if out.index is None else out.index
        if index >= torch.cuda.device_count():
            raise BackendError(f"device {str(out)!r} cannot be used: there are {torch.cuda.device_count()} CUDA devices")
        out = torch.device("cuda", index)
    return out


def check_dtype(dtype: object, device: torch.device) -> torch.dtype:
    """A dtype that the engines compute in. Raises ArgumentError, or BackendError where the device lacks it."""
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:
        raise ArgumentError("dtype", "one of torch." + ", torch.".join(map(short, DTYPES)), repr(dtype))
    if device.type == "mps" and dtype == torch.float64:
        raise BackendError("dtype float64 cannot be used: Metal has none; use float32")
    if device.type == "cuda" and dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported():
        raise BackendError("dtype bfloat16 cannot be used: this GPU has none; use float16 or float32")
    return dtype


def choose_backend(backend: str, device: torch.device) -> tuple[str, str]:
    """(name, why) of the backend that serves this request."""
    check_choice("backend", backend, ("auto", *BACKENDS))
    if backend != "auto":
        return backend, "asked for"
    return "torch", f"the best available on {device.type}"


def make_engine(
    backend: str, weights: BlockWeights, *, device: torch.device, dtype: torch.dtype, compile: bool
) -> BlockEngine:
    """The engine of one flow block; `backend` is a name that `choose_backend` gave."""
    return TorchEngine(weights, device=device, dtype=dtype, compile=compile)
