"""Where verdicts are kept between processes, by all that they depend on."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..cache import cache_folder, cache_path, read_json, write_json
from ..checks import short
from ..engine.backend import Backend
from ..engine.shape import BlockShape
from ..engine.verdict import Size, Verdict
from .job import DensityJob

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

FORMAT = 1  # raised whenever what a probe covers changes
KIND = "verdicts"
WAIT = 0.2  # seconds between two looks at a lock that another process has


@functools.cache
def device_facts(device: torch.device) -> dict[str, Any]:
    """Returns all of a device and of the software that drives it that a verdict depends on."""
    facts: dict[str, Any] = {"kind": device.type, "torch": torch.__version__, "cuda": torch.version.cuda}
    with contextlib.suppress(metadata.PackageNotFoundError):
        facts["triton"] = metadata.version("triton")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"name": properties.name, "multiprocessors": properties.multi_processor_count}
        facts |= {"capability": [properties.major, properties.minor], "driver": _driver()}
    else:
        facts |= {"name": platform.processor() or platform.machine()}
    return facts


def _driver() -> str:
    """Returns the driver's version: the CUDA version that it serves, and on Linux its own."""
    version = getattr(torch._C, "_cuda_getDriverVersion", lambda: None)()
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
        return f"{version}, {text.splitlines()[0]}" if text else str(version)
    return str(version)


@functools.cache
def sources(module: str = "") -> str:
    """Returns a hash of the package's engines, kernels and native code, and of the module that a backend is made in."""
    package = Path(__file__).parent.parent
    folders = [package / name for name in ("engine", "backend", "probe", "solvers")]
    kernels = importlib.util.find_spec("tarflow_fast.kernels")  # which lie elsewhere where the package is not installed
    folders += map(Path, (kernels and kernels.submodule_search_locations) or ())
    files = [path for folder in folders for path in folder.rglob("*.py")] + list(package.glob("_cuda*"))
    own = getattr(sys.modules.get(module), "__file__", None)
    if own is not None:
        files.append(Path(own))
    digest = hashlib.sha256()
    for path in sorted(set(files)):
        with contextlib.suppress(OSError):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:32]


def _module(backend: Backend) -> str:
    """Returns the name of the module in which a backend's engines are made."""
    maker: Any = backend.maker
    while isinstance(maker, functools.partial):
        maker = maker.func
    return str(getattr(maker, "__module__", type(maker).__module__))


def engine_key(
    backend: Backend, default: str, device: torch.device, dtype: torch.dtype, shapes: Sequence[BlockShape]
) -> dict[str, Any]:
    """Returns all that a verdict on a backend depends on, but for the size of a batch."""
    return {
        "format": FORMAT,
        "backend": backend.name,
        "default": default,
        "device": device_facts(device),
        "dtype": short(dtype),
        "precision": torch.get_float32_matmul_precision(),
        "shapes": [asdict(shape) for shape in shapes],
        "sources": sources(_module(backend)),
    }


def density_key(job: DensityJob) -> dict[str, Any]:
    """Returns all that a verdict on the density pass's kernel depends on."""
    sizes = {"tokens": job.tokens, "token_dim": job.token_dim, "affine": job.affine}
    return {"format": FORMAT, "backend": job.name, "device": device_facts(job.device), **sizes, "sources": sources()}


class Entry:
    """The place of one verdict, or of all of a backend for a model.

    key: what it depends on. size: the size of a batch, whose bucket counts; None is the place of a revocation, which
    holds for all sizes.
    """

    def __init__(self, key: Mapping[str, Any], size: Size | None = None):
        self.key = {**key, "bucket": None if size is None else list(size.bucket)}
        self.path = cache_path(KIND, self.key)

    def read(self) -> Verdict | None:
        """Returns the verdict that is kept, or None; a file that cannot be understood counts as none."""
        content = read_json(self.path)
        try:
            return None if content is None else Verdict.from_dict(content["verdict"])
        except (KeyError, TypeError, ValueError):
            return None

    def write(self, verdict: Verdict) -> None:
        """Keep the verdict. Raises OSError."""
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        write_json(self.path, {"key": self.key, "at": at, "verdict": verdict.to_dict()})

    def forget(self) -> None:
        """Remove what is kept, if anything is. Raises OSError."""
        self.path.unlink(missing_ok=True)


def kept() -> list[tuple[dict[str, Any], Verdict]]:
    """Returns all verdicts that are kept, with what each depends on."""
    found = []
    for path in sorted((cache_folder() / KIND).glob("*.json")):
        content = read_json(path)
        with contextlib.suppress(KeyError, TypeError, ValueError):
            key, verdict = content["key"], Verdict.from_dict(content["verdict"])
            found.append(({**key, "backend": str(key["backend"]), "device": {**key["device"]}}, verdict))
    return found


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Keep this block's process the only one of this user's that probes: others wait here until it is done or dead.

    Where there can be no lock, as on a full disk, the block runs without.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            folder = cache_folder() / KIND
            folder.mkdir(parents=True, exist_ok=True)
            _lock(stack.enter_context((folder / "lock").open("a")).fileno())
        yield


def _lock(descriptor: int) -> None:
    """Wait for the lock on a file, which goes with its descriptor. Raises OSError where it cannot be locked."""
    while True:
        try:
            if sys.platform == "win32":
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except (BlockingIOError, PermissionError):
            time.sleep(WAIT)
