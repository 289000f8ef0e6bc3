"""The job of a folder is what is drawn there, as the first process has written it down, and which of it is done."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ArgumentError, TarFlowWarning
from ...files import remove_unfinished, replacing
from ...flow import Flow
from ...locks import Lock
from .formats import SWEEP
from .plan import ShardPlan

JOB, MANIFEST, RECORDS = "job.json", "manifest.json", "records"
_OWN = (JOB, MANIFEST, RECORDS)


def write_json(path: Path, content: Any) -> None:
    with replacing(path, sweep=SWEEP) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Returns the content of a file of the run. Raises ArgumentError where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArgumentError("out", "the folder of a run, or a new one", f"{str(path)!r}, which is damaged") from error


def model_hash(flow: Flow) -> str:
    """Returns the SHA-256, in hexadecimal, of all that a model computes with: weights, orders of tokens, prior."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            data = value.detach().cpu().contiguous()
            digest.update(f"{data.dtype} {tuple(data.shape)}".encode())
            digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
        elif is_dataclass(value):
            for field in fields(value):
                add(getattr(value, field.name))
        elif isinstance(value, (tuple, list)):
            for item in value:
                add(item)
        else:
            digest.update(repr(value).encode())

    for stage in flow.stages:
        add(stage.make_weights())
        add(stage.order.indices)
        add(stage.start)
    add(flow.prior_var)
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_folder(out: Path) -> None:
    """Raises ArgumentError unless this is a folder of a run, or empty, or not there yet."""
    if out.exists() and not out.is_dir():
        raise ArgumentError("out", "a folder", f"the file {str(out)!r}")
    if out.is_dir():
        others = sorted(path.name for path in out.iterdir() if path.name[0] != "." and path.name not in _OWN)
        if others and not (out / JOB).exists():  # in this order, as another process may have just begun
            got = f"{str(out)!r}, which holds {others[0]!r}"
            raise ArgumentError("out", "a new or empty folder, or that of the same run", got)


class Job:
    """A `Job` is what is drawn in a folder.

    out: the folder, which is made where it is not there. plan: which images are in which shard. asked: what the images
    depend on, as plain values by name; a job that is there has to have the same. Raises ArgumentError where it has not,
    and for a folder that holds something else.
    """

    def __init__(self, out: Path, plan: ShardPlan, asked: Mapping[str, Any]):
        self.out, self.plan = out, plan
        self.asked = json.loads(json.dumps(asked))
        self._done: dict[int, int] = {}  # the number of images of each shard that is known to be done
        self.settled: dict[str, Any] | None = None
        self._warned = False
        check_folder(out)
        if (out / JOB).exists():
            self._read()

    def _read(self) -> None:
        there = read_json(self.out / JOB)
        asked = there.get("asked") if isinstance(there, dict) else None
        if not isinstance(asked, dict) or not isinstance(there.get("settled"), dict):
            raise ArgumentError("out", "the folder of a run, or a new one", f"{str(self.out / JOB)!r}, which is none's")
        for name, value in self.asked.items():
            if asked.get(name) != value:
                expected = f"a new folder, or {name} {asked.get(name)!r}, with which {str(self.out)!r} was begun"
                raise ArgumentError("out", expected, repr(value))
        self.settled = there["settled"]

    @contextlib.contextmanager
    def beginning(self, seconds: float) -> Iterator[bool]:
        """Gives whether this process is the one to settle the job, which it writes by `begin` in the block.

        Other processes wait until that is done. seconds: the time between two looks.
        """
        (self.out / RECORDS).mkdir(parents=True, exist_ok=True)
        while self.settled is None:
            lock = Lock.take(self._claim("job"))
            if lock is None:
                time.sleep(seconds)
                continue
            try:
                if (self.out / JOB).exists():
                    self._read()
                    continue
                yield True
                return
            finally:
                lock.release()
        yield False

    def begin(self, version: str, settled: Mapping[str, Any]) -> None:
        """Writes the job down. settled: what all processes are to do alike, though it depends on the machine."""
        self.settled = dict(settled)
        write_json(self.out / JOB, {"tarflow_fast": version, "asked": self.asked, "settled": self.settled})

    def _claim(self, name: str) -> Path:
        return self.out / f".{name}.claim"

    def _record(self, shard: int) -> Path:
        return self.out / RECORDS / f"{self.plan.name(shard)}.json"

    def done(self, shard: int) -> bool:
        """Returns whether a shard is written and recorded."""
        if shard not in self._done and self._record(shard).exists():
            self._done[shard] = len(self.plan.numbers(shard))
        return shard in self._done

    def take(self, shard: int) -> Lock | None:
        """Returns the claim to a shard, or None where another process has it, or has done it."""
        if self.done(shard):
            return None
        lock = Lock.take(self._claim(self.plan.name(shard)))
        if lock is not None and self.done(shard):  # meanwhile
            lock.release()
            return None
        if lock is not None and lock.refused is not None and not self._warned:
            self._warned = True
            text = f"{self.out}: {lock.refused.strerror} for a lock: processes that share it may draw a shard twice"
            warnings.warn(text, TarFlowWarning, stacklevel=2)
        return lock

    def claims(
        self, order: Iterable[int], seconds: float, look: Callable[[], object]
    ) -> Generator[tuple[int, Lock], None, None]:
        """Yields shards, each with the claim to it, until all of them are done, whoever does them.

        A claim ends when the next one is asked for. Where other processes have all that is missing, it waits, as they
        may end before that is done. order: all shards, in the order in which this process tries them. seconds: the time
        between two looks. look: called at each of them.
        """
        order = list(order)
        while missing := [shard for shard in order if not self.done(shard)]:
            idle = True
            for shard in missing:
                claim = self.take(shard)
                if claim is None:
                    continue
                idle = False
                try:
                    yield shard, claim
                finally:
                    claim.release()
            if idle:
                look()
                time.sleep(seconds)

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Adds to whatever ends the block how much is there, as the same call goes on with it."""
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(OSError):
                there = sum(len(self.plan.numbers(shard)) for shard in range(len(self.plan)) if self.done(shard))
                error.add_note(f"{self.out}: {there} of {self.plan.n} images are there; the same run goes on")
            raise

    def record(self, shard: int, file: Path, facts: Mapping[str, Any]) -> None:
        """Counts a shard as done, whose file is whole. facts: what else is recorded of it."""
        numbers = self.plan.numbers(shard)
        content = {"file": file.name, "first": numbers.start, "images": len(numbers), "sha256": file_hash(file)}
        write_json(self._record(shard), {**content, "bytes": file.stat().st_size, **facts})

    def images(self) -> int:
        """Returns how many images have been drawn, by all processes, those of unfinished shards as far as known."""
        count = 0
        for shard in range(len(self.plan)):
            if self.done(shard):
                count += self._done[shard]
            else:
                with contextlib.suppress(OSError, ValueError):
                    count += int(self._claim(self.plan.name(shard)).read_text())
        return count

    def finish(self, seconds: float) -> None:
        """Writes the manifest of all shards, and removes what processes that were killed have left.

        One process does so at a time, the others waiting. seconds: the time between two looks.
        """
        while (lock := Lock.take(self._claim("manifest"))) is None:
            time.sleep(seconds)
        try:
            self._finish()
        finally:
            lock.release()

    def _finish(self) -> None:
        if not (self.out / MANIFEST).exists():
            shards = [read_json(self._record(shard)) for shard in range(len(self.plan))]
            job = read_json(self.out / JOB)
            write_json(self.out / MANIFEST, {**job, "images": self.plan.n, "shards": shards})
        for folder in (self.out, self.out / RECORDS, *(self.out / "images").glob("*/")):
            remove_unfinished(folder)
        for path in self.out.glob(".*.claim"):
            with contextlib.suppress(OSError):
                lock = Lock.take(path)
                if lock is not None:
                    lock.release()
