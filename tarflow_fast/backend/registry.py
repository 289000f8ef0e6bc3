"""The table of backends: which there are, which of them can run here and why, and how their engines are made."""

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
from ..engine.verdict import Gate
from ..engine.weights import BlockWeights
from ..errors import ArgumentError, BackendError, first_line
from ..limits import most_threads
from ..scalars import check_flag

# The name and folder of each backend, the best for a kind of device first. Every folder has a `BACKEND`.
FOLDERS = {"cuda": "cuda", "triton": "triton", "cpu": "cpu", "torch": "pytorch"}

_registered: dict[str, Backend] = {}


def register(backend: Backend) -> None:
    """Add a backend from outside the package, for this process. Raises ArgumentError if its name is taken."""
    if not isinstance(backend, Backend):
        raise ArgumentError("backend", "a Backend", type(backend).__name__)
    if backend.name in names() or backend.name == "auto":
        raise ArgumentError("backend", "a name that no other backend has", repr(backend.name))
    _registered[backend.name] = backend


def unregister(name: str) -> None:
    """Remove a backend that `register` added."""
    del _registered[name]


def names() -> tuple[str, ...]:
    """Returns the names of all backends, those from outside first."""
    return (*_registered, *FOLDERS)


def backend_named(name: str) -> Backend:
    """Returns the backend of this name. Raises ArgumentError if there is none."""
    check_choice("backend", name, names())
    if name in _registered:
        return _registered[name]
    found: Backend = import_module(f".{FOLDERS[name]}", __package__).BACKEND
    return found


@dataclass(frozen=True)
class BackendStatus:
    """One backend on one kind of device, and whether it can run here.

    Attributes:
        name: The name of the backend.
        device: The kind of device: "cuda", "mps" or "cpu".
        available: Whether the backend can run here on such a device.
        reason: What runs there if it can; else why it cannot, and what would mend that.
    """

    name: str
    device: str
    available: bool
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Returns the attributes as a dictionary."""
        return asdict(self)


def backends() -> list[BackendStatus]:
    """List every backend on every kind of device, with the reason why it can or cannot run here.

    Returns:
        The status of each pair of backend and kind of device that it is for. Kinds come in the order cuda, mps, cpu,
        and the best backend of each first.
    """
    all_backends = [backend_named(name) for name in names()]
    return [_status(each, kind) for kind in ("cuda", "mps", "cpu") for each in all_backends if kind in each.devices]


def _status(backend: Backend, kind: str) -> BackendStatus:
    # Where the device and the backend are both missing, both reasons are given, as both have to be mended.
    missing = "; ".join(filter(None, (device_missing(kind), backend.not_installed()))) or None
    if missing is None:
        device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
        missing = _missing(backend, Request(device))
        if missing is None:
            proof = "; 'auto' takes it where a probe proves it" if backend.probed else ""
            return BackendStatus(backend.name, kind, True, backend.describe(device) + proof)
    return BackendStatus(backend.name, kind, False, missing)


def check_compile(compile: object, device: torch.device) -> bool:
    """Returns whether to compile. Raises ArgumentError, or BackendError where there is no compiler for it."""
    compile = check_flag("compile", compile)
    if compile and device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise BackendError("compile=True cannot be had: torch.compile needs a C++ compiler; install g++ or set CXX")
    return compile


def default_backend(request: Request) -> tuple[str, str]:
    """Returns the name of the best backend for this request that needs no probe, and the reason."""
    kind = request.device.type
    among = [name for name in FOLDERS if kind in backend_named(name).devices and not backend_named(name).probed]
    missing = {name: backend_named(name).missing(request) for name in among}
    able = next(name for name, why in missing.items() if why is None)  # `torch` can always be had
    return able, next(filter(None, missing.values()), None) or f"the best available on {kind} that needs no probe"


def candidates(request: Request) -> tuple[list[str], dict[str, str]]:
    """Returns the names of the backends for this kind of device that serve where a probe has proven them, and, of such
    backends that cannot serve the request, why.
    """
    probed = [each for each in map(backend_named, names()) if each.probed and request.device.type in each.devices]
    missing = {each.name: _missing(each, request) for each in probed}
    return [name for name, why in missing.items() if why is None], {n: why for n, why in missing.items() if why}


def _missing(backend: Backend, request: Request) -> str | None:
    """Returns what `backend.missing` does; what it raises, as a library that is broken does, is a reason too."""
    try:
        return backend.missing(request)
    except Exception as error:
        return f"it cannot be asked, as it raises {type(error).__name__}: {first_line(error)}"


def choose_backend(backend: str, request: Request) -> tuple[str, str]:
    """Returns the name of the backend that serves this request, and the reason; "auto" is the quickest of several.

    Raises ArgumentError for an unknown name, and BackendError if the backend that was asked for cannot serve.
    """
    check_choice("backend", backend, ("auto", *names()))
    if backend != "auto":
        missing = backend_named(backend).missing(request)
        if missing is not None:
            raise BackendError(f"backend {backend!r} cannot be had: {missing}")
        return backend, "asked for"
    default, reason = default_backend(request)
    able, missing_ones = candidates(request)
    if able:
        return "auto", f"the quickest of {', '.join([default, *able])} that is proven, for each size of batch"
    return default, "; ".join([reason, *(f"{name!r}: {why}" for name, why in missing_ones.items())])


def check_threads(threads: object, backend: str) -> int | None:
    """Returns the number of threads, or None for the default.

    Raises ArgumentError for another value, and BackendError for a backend that has no threads of its own.
    """
    if threads is None:
        return None
    count = check_count("threads", threads, high=most_threads())
    if backend == "auto" or not backend_named(backend).has_threads:
        raise BackendError(
            f"threads is for backend 'cpu', and this is {backend!r}; leave threads out (OMP_NUM_THREADS tells PyTorch)"
        )
    return count


def make_engines(
    backend: str, blocks: Iterable[BlockWeights], request: Request, gate: Gate | None = None
) -> list[BlockEngine]:
    """Returns the engines of a model's flow blocks.

    backend: a name that `choose_backend` gave. blocks: the weights of each block. gate: what tells "auto" which
    backends are proven. Raises BackendError where the backend does not take blocks of such a shape.
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
    if gate is None:
        raise ArgumentError("gate", "what tells which backends are proven, with backend='auto'", None)
    default, _ = default_backend(request)
    among = [default, *candidates(request)[0]]
    makers = {name: functools.cache(functools.partial(backend_named(name).maker, request)) for name in among}
    choices = Choices(default, gate)

    def make_one(name: str, weights: BlockWeights) -> BlockEngine:
        return makers[name]()(weights)  # a maker is asked for only when its backend is proven

    return [
        AutotunedEngine({name: functools.partial(make_one, name, weights) for name in among}, request.dtype, choices)
        for weights in blocks
    ]
