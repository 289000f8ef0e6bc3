"""The images of a run are drawn into a folder, shard by shard, by any number of processes that share it.

A process claims a shard by a lock, which ends with the process, draws it, writes it whole, and records it. What is
recorded is done; everything else is drawn by whoever finds it. So a run may be stopped at any time, by whatever means,
and goes on by the same call, with another number of processes if need be.

The images do not depend on who draws them. Each shard is drawn in batches of one size from its first image on, and
where the quickest way through a block depends on times, the first process measures it for all.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...checks import Count, check_choice, check_count, environment_count
from ...errors import ArgumentError
from ...files import PathLike
from ...limits import MOST_NUMBER, MOST_SEED
from ...locks import Lock
from ...scalars import check_flag
from ...solvers import Auto
from ..labels import LabelRule, LabelsByNumber
from ..memory import fitting_batch
from ..report import Report
from ..rule import Rule
from ..sampler import Sampler
from .formats import FORMATS, Format, Shard, check_shape, class_folders
from .job import Job, model_hash
from .job_bar import JobBar
from .plan import ShardPlan

SHARD_SIZE = 1024  # images of a shard
MOST_SHARDS = 10**6  # each has a file of its own, and all are looked through
LOOK_SECONDS = 0.5  # between two looks at what other processes do
TRIALS = 4  # batches that may be drawn to find the quickest way through each block
SOME = 4096  # a function of labels is known by so many of its values

RULE: dict[str, Any] = {
    "guidance": 0.0,
    "guide_what": "ab",
    "attn_temp": 1.0,
    "annealed_guidance": False,
    "denoise": False,
    "noise_std": None,
    "denoise_scale": 1.0,
    "on_nonfinite": "raise",
}


def processes_of_environment() -> tuple[int, int]:
    """Returns (rank, world) as torchrun tells them by RANK and WORLD_SIZE, else (0, 1). Raises ArgumentError."""
    world = environment_count("WORLD_SIZE", 1, 1)
    rank = environment_count("RANK", 0, 0)
    if rank >= world:
        raise ArgumentError("RANK", f"an integer below WORLD_SIZE = {world} in the environment", rank)
    return rank, world


def draw_shards(
    sampler: Sampler,
    out: PathLike,
    n: Count,
    labels: LabelsByNumber = None,
    *,
    seed: Count = 0,
    first: Count = 0,
    format: str | Format = "npz",
    shard_size: Count = SHARD_SIZE,
    batch_size: Count | None = None,
    progress: bool = False,
    **rule: Any,
) -> dict[str, Any]:
    """Draws the images numbered first … first+n−1 of a seed into a folder, and returns when all of them are there.

    Any number of processes may call this with the same arguments, on machines that share the folder and have locks on
    it: they divide the shards among them, by RANK and WORLD_SIZE of the environment if these are set, and those of a
    process that ends are drawn by the others. However the call ends, the same one goes on. No more than a batch is
    held.

    Args:
        sampler: The sampler. With another `backend`, or on another kind of device, images are others by rounding.
        out: The folder: a new or empty one, or that of the same run. It gets the shards, `manifest.json` when all are
            there, `job.json`, and a record of each shard in `records`.
        n: The number of images.
        labels: As in `Sampler.sample`.
        seed: As in `Sampler.sample`.
        first: As in `Sampler.sample`.
        format: "npz", "png" or "tar", see `formats.py`; or another `Format`, as `evaluation.feature_format` gives.
        shard_size: The number of images of a shard.
        batch_size: The most images of a batch, by default what fits in memory when the run begins, and at most 256.
        progress: Whether to show a bar for all processes, on that with rank 0.
        rule: How images are drawn: guidance, guide_what, attn_temp, annealed_guidance, denoise, noise_std,
            denoise_scale and on_nonfinite, as in `Sampler.sample`.

    Returns:
        A dict of plain values: "images" and "shards" of the whole run; "drawn", "seconds" and "images_per_second" of
        this process; and "report", of the batches that it drew, or None.

    Raises:
        ArgumentError: An argument has the wrong type or range, or the folder holds something else, as another run.
        NonFiniteError: As in `Sampler.sample`; what is there stays.
        OSError: The system refuses to write; what is there stays.
        OutOfMemoryError: A batch does not fit in memory.
    """
    run = Run(sampler, out, n, labels, seed=seed, first=first, format=format, shard_size=shard_size, rule=rule)
    return run.draw(batch_size, check_flag("progress", progress))


class Run:
    """A `Run` draws images into a folder; its arguments are those of `draw_shards`. rule: as a dict."""

    def __init__(
        self,
        sampler: Sampler,
        out: PathLike,
        n: Count,
        labels: LabelsByNumber,
        *,
        seed: Count,
        first: Count,
        format: str | Format,
        shard_size: Count,
        rule: dict[str, Any],
    ):
        if not isinstance(sampler, Sampler):
            raise ArgumentError("sampler", "a Sampler", type(sampler).__name__)
        if not isinstance(out, (str, os.PathLike)) or isinstance(os.fspath(out), bytes):
            raise ArgumentError("out", "a path", type(out).__name__)
        if unknown := sorted(rule.keys() - RULE):
            raise ArgumentError("rule", "arguments of Sampler.sample: " + ", ".join(RULE), unknown[0])
        self.sampler, self.flow = sampler, sampler.flow
        n = check_count("n", n, high=MOST_NUMBER)
        self.plan = ShardPlan(
            check_count("first", first, 0, MOST_NUMBER - n), n, check_count("shard_size", shard_size, high=MOST_NUMBER)
        )
        if len(self.plan) > MOST_SHARDS:
            expected = f"at least {-(-n // MOST_SHARDS)}, as there are at most {MOST_SHARDS} shards"
            raise ArgumentError("shard_size", expected, self.plan.size)
        self.seed, self.labels = check_count("seed", seed, 0, MOST_SEED), labels
        self.format = format if isinstance(format, Format) else FORMATS[check_choice("format", format, list(FORMATS))]
        check_shape(self.format.name, self.flow.data_shape)
        self.rule = {**RULE, **rule}
        label_of = LabelRule(labels, self.flow.num_classes, self.flow.class_names)
        self.checked = Rule.checked(self.flow, label_of.none, trajectory=self.format.trajectory, **self.rule)
        self.rank, self.world = processes_of_environment()
        self.out = Path(out)
        self.folders = class_folders(self.flow.num_classes, self.flow.class_names)
        self.job = Job(self.out, self.plan, self._asked(label_of))
        self._settled = sampler
        self._batch = 0

    def _asked(self, label_of: LabelRule) -> dict[str, Any]:
        """Returns what the images depend on, as plain values."""
        plan, sampler, rule, guidance = self.plan, self.sampler, self.checked, self.checked.guidance
        labels = label_of(range(plan.first, plan.first + min(plan.n, SOME)))
        return {
            "n": plan.n,
            "first": plan.first,
            "seed": self.seed,
            "labels": None if labels is None else hashlib.sha256(labels.numpy().tobytes()).hexdigest(),
            "guidance": guidance.scale,
            "guide_what": guidance.what,
            "attn_temp": guidance.attn_temp,
            "annealed_guidance": guidance.annealed,
            "denoise": rule.denoise,
            "noise_std": rule.noise_std,
            "denoise_scale": rule.denoise_scale,
            "format": self.format.described,
            "shard_size": plan.size,
            "dtype": str(sampler.dtype).removeprefix("torch."),
            "backend": sampler.backend,
            "solver": sampler.solver,
            "tol": sampler._tol,
            "model": model_hash(self.flow),
        }

    def stream(self, numbers: range, batch: int) -> Any:
        """Returns a stream of the images of these numbers."""
        return self._settled.stream(
            len(numbers),
            self.labels,
            seed=self.seed,
            first=numbers.start,
            batch_size=batch,
            trajectory=self.format.trajectory,
            **self.rule,
        )

    def prepare(self, batch_size: Count | None) -> int:
        """Takes over what the run has settled, or else settles it, and returns the size of a batch."""
        if batch_size is not None:
            batch_size = check_count("batch_size", batch_size)
        settled = self.job.settled or self._settle(batch_size)
        batch = check_count("batch_size", settled.get("batch_size"))
        if batch_size is not None and min(batch_size, self.plan.size, self.plan.n) != batch:
            raise ArgumentError("batch_size", f"{batch}, with which {str(self.out)!r} was begun", batch_size)
        if settled.get("windows") is not None:
            choosers = [solver for solver in self.sampler.solvers if isinstance(solver, Auto)]
            fixed = [solver.fixed(window) for solver, window in zip(choosers, settled["windows"], strict=True)]
            self._settled = self.sampler.with_solvers(fixed)
        return batch

    def _settle(self, batch_size: Count | None) -> dict[str, Any]:
        """Returns what all processes are to do alike, though it depends on the machine: the size of a batch, and the
        window of each block, where the solver takes the quickest."""
        guided, device = self.checked.guidance.active, self.sampler.device
        most = min(self.plan.n, self.plan.size)
        beside = environment_count("LOCAL_WORLD_SIZE", 1, 1) if device.type == "cpu" else 1
        batch = fitting_batch(self.sampler.engines[-1], device, most, guided, batch_size, processes=beside)
        solvers = self.sampler.solvers
        choosers = [solver for solver in solvers if isinstance(solver, Auto)]
        windows: list[int | None] | None = None
        if len(choosers) == len(solvers):
            for _ in range(TRIALS):
                for _ in self.stream(range(self.plan.first, self.plan.first + batch), batch):
                    pass
                before, windows = windows, [solver.window(batch, guided) for solver in choosers]
                if windows == before or not any(windows):
                    break
        return {"batch_size": batch, "windows": windows}

    def begin(self, batch_size: Count | None) -> None:
        """Settles what all processes do alike and writes it down, or takes over what another one has."""
        with self.job.beginning(LOOK_SECONDS) as first:
            if first:
                self.job.begin(version("tarflow_fast"), self._settle(batch_size))
        self._batch = self.prepare(batch_size)

    def draw(self, batch_size: Count | None, progress: bool) -> dict[str, Any]:
        """Draws shards until all are there. See `draw_shards`."""
        self.begin(batch_size)
        started, drawn = time.perf_counter(), 0
        report: Report | None = None
        with JobBar(self.job, progress and self.rank == 0, "sampling", LOOK_SECONDS) as bar, self.job.noting():
            claims = self.job.claims(self.plan.order(self.rank, self.world), LOOK_SECONDS, bar.update)
            with contextlib.closing(claims):
                for shard, claim in claims:
                    report = _merged(report, self._draw(shard, claim, bar.update))
                    drawn += len(self.plan.numbers(shard))
                    bar.update()
            self.job.finish(LOOK_SECONDS)
        seconds = time.perf_counter() - started
        return {
            "images": self.plan.n,
            "shards": len(self.plan),
            "drawn": drawn,
            "seconds": seconds,
            "images_per_second": drawn / seconds,
            "report": None if report is None else report.to_dict(),
        }

    def _draw(self, shard: int, claim: Lock, update: Callable[[], None]) -> Report:
        """Draws one shard, writes it and records it."""
        numbers, done = self.plan.numbers(shard), 0
        report: Report | None = None
        place = Shard(self.out, self.plan.name(shard), numbers, self.flow.data_shape, self.folders)
        parts = self.stream(numbers, min(self._batch, len(numbers)))
        with self.format.writing(place) as add, contextlib.closing(parts):
            for part in parts:
                add(part)
                report = _merged(report, part.report)
                done += len(part.images)
                claim.write(str(done))
                update()
        assert report is not None
        facts = {"backend": report.backend, "device": report.device, "redrawn": report.redrawn}
        self.job.record(shard, self.out / f"{place.name}{self.format.suffix}", facts)
        return report


def _merged(whole: Report | None, part: Report) -> Report:
    if whole is None:
        return part
    whole.merge(part)
    return whole
