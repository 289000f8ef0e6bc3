"""The prober of a model: it has backends probed for the sizes of batch that come, and knows the verdicts."""

from __future__ import annotations

import functools
import os
import queue
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from ..backend.registry import FOLDERS, backend_named, candidates, default_backend
from ..checks import check_choice
from ..devices import triton_missing
from ..engine.backend import Backend, Request
from ..engine.shape import BlockShape
from ..engine.verdict import Size, Verdict
from ..errors import TarFlowWarning
from .job import DensityJob, EngineJob, Job, Limits
from .parent import OnRow, probe
from .store import Entry, alone, density_key, engine_key

MODES = ("background", "now", "never")
CHECK = "`tarflow-fast check` probes it"

_known: dict[Path, Verdict] = {}  # what this process has read or found, also where it cannot be kept
_queued: set[Path] = set()
_tasks: queue.Queue[tuple[Job, Entry, Limits | None]] = queue.Queue()
_starting = threading.Lock()
_worker: threading.Thread | None = None


class Prober:
    """A `Gate` for the engines of a model (see `engine/verdict.py`).

    shapes: the sizes of the model's blocks. request: what its engines are requested with. mode: "background" has what
    is not known probed while the default backend serves; "now" waits for it; "never" goes by what is kept. limits: the
    time that a probe may take. repeats: how often a pass is repeated in a probe.
    """

    def __init__(
        self,
        shapes: Sequence[BlockShape],
        request: Request,
        mode: str = "background",
        *,
        limits: Limits | None = None,
        repeats: int = 50,
    ):
        self.shapes, self.request = tuple(dict.fromkeys(shapes)), request
        self.mode = check_choice("probe", mode, MODES)
        self.limits, self.repeats = limits, repeats
        self._waiting: set[tuple[str, Size]] = set()
        self._told: set[str] = set()

    @functools.cached_property
    def default(self) -> str:
        """Returns the name of the backend that serves while none is proven."""
        return default_backend(self.request)[0]

    @functools.cached_property
    def names(self) -> list[str]:
        """Returns the names of the backends that may be proven."""
        return candidates(self.request)[0]

    def look(self, size: Size) -> Mapping[str, Verdict | None]:
        return {name: self._look(name, Size(*size)) for name in self.names}

    def revoke(self, name: str, why: str) -> None:
        _keep(Entry(self._key(name)), Verdict(False, why))

    def forget(self, size: Size) -> None:
        """Forget the verdicts for batches of this size, those that were revoked, and that on the density pass's kernel.

        Raises OSError.
        """
        entries = [each for name in self.names for each in (self.entry(name, size), Entry(self._key(name)))]
        for entry in [*entries, *(Entry(density_key(job)) for job in self.density_jobs())]:
            _known.pop(entry.path, None)
            entry.forget()

    def job(self, name: str, size: Size) -> EngineJob:
        """Returns the job that probes this backend for batches of this size."""
        return EngineJob(
            _sendable(backend_named(name)),
            self.default,
            self.request.device,
            self.request.dtype,
            torch.get_float32_matmul_precision(),
            self.shapes,
            size,
            self.repeats,
        )

    def entry(self, name: str, size: Size) -> Entry:
        """Returns the place of the verdict on this backend for batches of this size."""
        return Entry(self._key(name), size)

    def revoked(self, name: str) -> Verdict | None:
        """Returns the verdict that stands for all sizes of batch since one was revoked, or None."""
        return read(Entry(self._key(name)))

    def settle(self, name: str, size: Size, on_row: OnRow | None = None) -> Verdict:
        """Returns the verdict on this backend for batches of this size, after a probe where none is known."""
        return self.revoked(name) or settle(self.job(name, size), self.entry(name, size), self.limits, on_row)

    def unsupported(self, name: str) -> str | None:
        """Returns why a backend cannot take the blocks of this model, or None."""
        reasons = (backend_named(name).unsupported(shape, self.request.dtype) for shape in self.shapes)
        return next(filter(None, reasons), None)

    def density_jobs(self) -> list[DensityJob]:
        """Returns the jobs that probe the kernel of this model's density pass, where that can run."""
        if self.request.device.type != "cuda" or triton_missing() is not None:
            return []
        sizes = dict.fromkeys((shape.tokens, shape.token_dim, shape.affine) for shape in self.shapes)
        return [DensityJob(self.request.device, *each, self.repeats) for each in sizes]

    def _look(self, name: str, size: Size) -> Verdict | None:
        unsupported = self.unsupported(name)
        if unsupported is not None:
            return Verdict(False, unsupported, lasting=False)
        entry = self.entry(name, size)
        verdict = self.revoked(name) or read(entry)
        if verdict is None and self.mode == "never":
            return Verdict(False, f"not probed on this device; {CHECK}", lasting=False)
        if verdict is None and self.mode == "now":
            self._waiting.add((name, size.bucket))
            verdict = self.settle(name, size)
        if verdict is None:
            if (name, size.bucket) not in self._waiting:
                self._waiting.add((name, size.bucket))
                said = f"backend {self.default!r} serves while {name!r} is probed on {self.request.device}"
                self._tell(f"{said}; {CHECK} once for all, and probe='now' waits")
                density = [(job, Entry(density_key(job))) for job in self.density_jobs()]
                _enqueue([(self.job(name, size), entry), *density], self.limits)
        elif (name, size.bucket) in self._waiting:
            self._waiting.discard((name, size.bucket))
            times = verdict.seconds
            if verdict.proven and name in times:
                pace = f"{times[self.default] / times[name]:.2g} times as fast as {self.default!r}"
                self._tell(f"backend {name!r} is proven on {self.request.device}: {pace} at {size}, {verdict.reason}")
            else:
                self._tell(f"backend {name!r} will not be used on {self.request.device}: {verdict.reason}")
        return verdict

    def _tell(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            warnings.warn(line, TarFlowWarning, stacklevel=2)

    def _key(self, name: str) -> dict[str, object]:
        return engine_key(backend_named(name), self.default, self.request.device, self.request.dtype, self.shapes)


def read(entry: Entry) -> Verdict | None:
    """Returns the verdict that this process knows or that is kept, or None."""
    if entry.path not in _known:
        verdict = entry.read()
        if verdict is not None:
            _known[entry.path] = verdict
    return _known.get(entry.path)


def settle(job: Job, entry: Entry, limits: Limits | None = None, on_row: OnRow | None = None) -> Verdict:
    """Returns the verdict of a job: one that is kept, perhaps by another process meanwhile, or else that of a probe.

    job: what is probed. entry: the place of its verdict. limits, on_row: see `probe`.
    """
    with alone():
        verdict = entry.read()
        if verdict is None:
            verdict = probe(job, limits, on_row)
            _keep(entry, verdict)
    _known[entry.path] = verdict
    return verdict


def _keep(entry: Entry, verdict: Verdict) -> None:
    _known[entry.path] = verdict
    if verdict.lasting:
        try:
            entry.write(verdict)
        except OSError as error:
            warnings.warn(f"a verdict could not be kept and will be found again: {error}", TarFlowWarning, stacklevel=2)


def _enqueue(tasks: Iterable[tuple[Job, Entry]], limits: Limits | None) -> None:
    """Have these jobs done one after the other by a thread, each once in a process."""
    global _worker
    with _starting:
        for job, entry in tasks:
            if entry.path not in _queued and entry.path not in _known:
                _queued.add(entry.path)
                _tasks.put((job, entry, limits))
        if _worker is None or not _worker.is_alive():
            _worker = threading.Thread(target=_work, name="tarflow_fast probe", daemon=True)
            _worker.start()


def _work() -> None:
    while True:
        job, entry, limits = _tasks.get()
        try:
            settle(job, entry, limits)
        except Exception as error:
            _known[entry.path] = Verdict(False, f"the probe itself failed: {error}", lasting=False)
        finally:
            _queued.discard(entry.path)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_queued.clear)  # the thread that does them is the parent's


def _sendable(backend: Backend) -> Backend | str:
    """Returns the name of a backend of the package's own, which every process knows, or else the backend itself."""
    return backend.name if backend.name in FOLDERS else backend
