"""The table of backends: which there are, which can run here and why, and how their engines are made."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

import torch

from ..checks import check_choice, check_count
from ..devices import device_missing
from ..engine.autotune import AutotunedEngine, Choices
from ..engine.backend import Backend, Request
from ..engine.contract import BlockEngine
from ..engine.weights import BlockWeights
from ..errors import ArgumentError, BackendError
from ..limits import most_threads
from ..scalars import check_flag

# Name and folder of each, the best of a kind of device first. A folder has a `BACKEND`.
FOLDERS = {"cuda": "cuda", "triton": "triton", "cpu": "cpu", "torch": "pytorch"}
# What backend="auto" chooses from on a GPU. An engine belongs here once its tests and its bench have been run on one.
PROVEN_ON_GPU = ("torch",)

_registered: dict[str, Backend] = {}


def register(backend: Backend) -> None:
    """Adds a backend from outside the package, for this process. Raises ArgumentError for a name that is taken."""
    if not isinstance(backend, Backend):
        raise ArgumentError("backend", "a Backend", type(backend).__name__)
    if backend.name in names() or backend.name == "auto":
        raise ArgumentError("backend", "a name that no other backend has", repr(backend.name))
    _registered[backend.name] = backend


def unregister(name: str) -> None:
    """Takes back `register`."""
    del _registered[name]


def names() -> tuple[str, ...]:
    """The names of all backends, those from outside first."""
    return (*_registered, *FOLDERS)


def backend_named(name: str) -> Backend:
    """The backend of this name. Raises ArgumentError."""
    check_choice("backend", name, names())
    if name in _registered:
        return _registered[name]
    found: Backend = import_module(f".{FOLDERS[name]}", __package__).BACKEND
    return found


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
    all_backends = [backend_named(name) for name in names()]
    return [_status(each, kind) for kind in ("cuda", "mps", "cpu") for each in all_backends if kind in each.devices]


def _status(backend: Backend, kind: str) -> BackendStatus:
    # Both reasons, where both have to be mended.
    missing = "; ".join(filter(None, (device_missing(kind), backend.not_installed()))) or None
    if missing is None:
        device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
        try:
            missing = backend.missing(Request(device))
        except BackendError as error:
            missing = str(error)
        if missing is None:
            return BackendStatus(backend.name, kind, True, backend.describe(device) + _unproven(backend.name, kind))
    return BackendStatus(backend.name, kind, False, missing)


def _unproven(name: str, kind: str) -> str:
    return "; to be asked for: not yet measured on a GPU" if kind == "cuda" and name not in PROVEN_ON_GPU else ""


def check_compile(compile: object, device: torch.device) -> bool:
    """Whether to compile, if that can be had. Raises ArgumentError, or BackendError without a compiler."""
    compile = check_flag("compile", compile)
    if compile and device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise BackendError("compile=True cannot be had: torch.compile needs a C++ compiler; install g++ or set CXX")
    return compile


def choose_backend(backend: str, request: Request) -> tuple[str, str]:
    """(name, why) of the backend that serves this request; "auto" is the quickest of several.

    Raises BackendError if the one asked for cannot.
    """
    check_choice("backend", backend, ("auto", *names()))
    if backend != "auto":
        missing = backend_named(backend).missing(request)
        if missing is not None:
            raise BackendError(f"backend {backend!r} cannot be had: {missing}")
        return backend, "asked for"
    kind = request.device.type
    among = PROVEN_ON_GPU if kind == "cuda" else [name for name in FOLDERS if kind in backend_named(name).devices]
    reasons = {name: backend_named(name).missing(request) for name in among or ("torch",)}
    able = [name for name, missing in reasons.items() if missing is None]
    skipped = next(filter(None, reasons.values()), None)
    if kind != "cuda":
        return able[0], skipped or f"the best available on {kind}"
    if len(able) > 1:
        return "auto", f"the quickest of {', '.join(able)}, measured for each size of batch"
    return able[0], skipped or "the best that has been measured on a GPU; backend='triton' and 'cuda' have not"


def check_threads(threads: object, backend: str) -> int | None:
    """The number of threads of a backend that has its own, or None.

    Raises ArgumentError, or BackendError for other backends.
    """
    if threads is None:
        return None
    count = check_count("threads", threads, high=most_threads())
    if backend == "auto" or not backend_named(backend).has_threads:
        raise BackendError(
            f"threads is for backend 'cpu', and this is {backend!r}; leave threads out (OMP_NUM_THREADS tells PyTorch)"
        )
    return count


def make_engines(backend: str, blocks: Iterable[BlockWeights], request: Request) -> list[BlockEngine]:
    """The engines of a model's flow blocks; `backend` is a name that `choose_backend` gave.

    Raises BackendError where the backend does not take blocks of such a shape.
    """
    if backend != "auto":
        chosen = backend_named(backend)
        make = chosen.maker(request)
        engines = []
        for weights in blocks:
            unsupported = chosen.unsupported(weights.shape, request.dtype)
            if unsupported is not None:
                raise BackendError(unsupported)
            engines.append(make(weights))
        return engines
    able = [name for name in PROVEN_ON_GPU if backend_named(name).missing(request) is None]
    makers = {name: backend_named(name).maker(request) for name in able}
    choices = Choices()
    return [
        AutotunedEngine(
            {name: functools.partial(make, weights) for name, make in makers.items()}, request.dtype, choices
        )
        for weights in blocks
    ]
