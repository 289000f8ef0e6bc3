"""Sampling returns images, and a report of how they were made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import host_ops
from ..checks import kind_of
from ..errors import ArgumentError
from ..solvers import Solution


@dataclass
class BlockReport:
    """A `BlockReport` tells how one flow block was inverted, over all batches.

    Attributes:
        passes: The most dependent steps that a batch took.
        evaluations: The number of tokens that the transformer was evaluated on, over all batches.
        residual: The largest |forward(x) − z| of this block alone; 0 if the inverse is exact, NaN if one of them is.
        window: The most tokens of an image in a pass, 1 in the sequential pass.
    """

    passes: int = 0
    evaluations: int = 0
    residual: float = 0.0
    window: int = 1

    def add(self, solution: Solution) -> None:
        """Counts a batch of this block.

        Args:
            solution: How the batch was solved.
        """
        most = float(solution.residual.max())
        self.merge(BlockReport(solution.passes, solution.evaluations, most, solution.window))

    def merge(self, other: BlockReport) -> None:
        """Adds what another report says of the same block and other batches.

        Args:
            other: The other report.
        """
        self.passes = max(self.passes, other.passes)
        self.evaluations += other.evaluations
        self.residual = float(np.maximum(self.residual, other.residual))  # numpy's maximum is NaN if one of them is
        self.window = max(self.window, other.window)


@dataclass
class Report:
    """A `Report` tells how samples were made.

    Attributes:
        backend: The name of the backend that ran; the names of several, separated by commas, where one was measured to
            be the quickest for each size of batch.
        backend_reason: Why that backend ran; the reasons of several are separated by semicolons.
        solver: The solver that was asked for.
        device: The device of the sampler.
        dtype: The dtype of weights and KV cache, without "torch.".
        batch_size: The most samples of a batch.
        seconds: The wall time of the inverse passes.
        setup_seconds: The part of `seconds` that is spent once for a batch size (compiling and choosing kernels,
            capturing graphs, measuring what passes cost), as far as it is known.
        denoise_seconds: The wall time of denoising.
        tokens: How many tokens were transformed, over all blocks, images that were drawn again counted again.
        cache_bytes: The size of the KV cache of one block for one batch, the largest that there was.
        redrawn: A dict from the number of an image to how many times it was drawn again.
        blocks: How each flow block was inverted, by its index.
    """

    backend: str
    backend_reason: str
    solver: str
    device: str
    dtype: str
    batch_size: int
    seconds: float = 0.0
    setup_seconds: float = 0.0
    denoise_seconds: float = 0.0
    tokens: int = 0
    cache_bytes: int = 0
    redrawn: dict[int, int] = field(default_factory=dict)
    blocks: list[BlockReport] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Returns how many tokens were transformed in a second of the inverse passes, 0 if no time has passed."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def merge(self, other: Report) -> None:
        """Adds what the same sampler did for other images.

        Args:
            other: The report of the other images.

        Raises:
            ArgumentError: It is no `Report`.
        """
        if not isinstance(other, Report):
            raise ArgumentError("other", "a Report", kind_of(other))
        if other.backend != self.backend:  # several backends have run, each with its reason
            served = dict(zip(self.backend.split(", "), self.backend_reason.split("; "), strict=True))
            for name, why in zip(other.backend.split(", "), other.backend_reason.split("; "), strict=True):
                served.setdefault(name, why)
            self.backend, self.backend_reason = ", ".join(served), "; ".join(served.values())
        self.seconds += other.seconds
        self.setup_seconds += other.setup_seconds
        self.denoise_seconds += other.denoise_seconds
        self.tokens += other.tokens
        self.cache_bytes = max(self.cache_bytes, other.cache_bytes)
        self.redrawn.update(other.redrawn)
        for block, its in zip(self.blocks, other.blocks, strict=True):
            block.merge(its)

    def to_dict(self) -> dict[str, Any]:
        """Returns the attributes as a dict of plain Python values, with "tokens_per_second"."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


@dataclass
class Samples:
    """`Samples` are what `Sampler.sample` returns on the CPU, and `Sampler.stream` yields on the sampler's device.

    Whatever the device, `error` is on the CPU, and so are the `labels`.

    Attributes:
        images: (n, in_channels, H, W), or (n, T, D) of a model of sequences, on the training scale, [-1, 1] for images,
            not clamped.
        log_prob: (n,) in nats, the model's log p(x | y) of each image before denoising; None under guidance, which
            draws from another distribution.
        labels: (n,) int64, -1 for no class, or None where there are none.
        report: How the samples were made.
        error: (n,) fp32, how far values of an image may be from those of the sequential solver, before denoising, by
            `tol` and by rounding, as the parallel passes show it (an estimate: see `solvers/trail.py`); infinite where
            that is unknown, 0 if there were no such passes.
        trajectory: The latents, then the images after each block, K + 1 tensors like `images`; None if not asked for.
    """

    images: Tensor
    log_prob: Tensor | None
    labels: Tensor | None
    report: Report
    error: Tensor
    trajectory: list[Tensor] | None = None

    @classmethod
    def collect(cls, n: int, parts: Iterable[Samples]) -> Samples:
        """Returns several `Samples` as one, on the CPU.

        Args:
            n: The number of images of all parts together, >= 1.
            parts: The parts, in order, at least one.

        Raises:
            ArgumentError: There are none.
        """
        whole, done = None, 0
        for part in parts:
            if whole is None:
                whole = part._room_for(n)
            else:
                whole.report.merge(part.report)
            rows = range(done, done + len(part.images))
            for target, values in zip(whole._tensors(), part._tensors(), strict=True):
                host_ops.put_rows(target, rows, values.cpu())
            done = rows.stop
        if whole is None:
            raise ArgumentError("parts", "at least one", "none")
        return whole

    def _room_for(self, n: int) -> Samples:
        """Returns uninitialised memory for n images of this kind, with this report."""

        def room(x: Any) -> Any:
            return None if x is None else torch.empty((n, *x.shape[1:]), dtype=x.dtype, device="cpu")

        frames = None if self.trajectory is None else [room(x) for x in self.trajectory]
        labels, error = room(self.labels), room(self.error)
        return Samples(room(self.images), room(self.log_prob), labels, self.report, error, frames)

    def _tensors(self) -> list[Tensor]:
        """Returns all tensors that have a row for each image."""
        found = (self.images, self.log_prob, self.labels, self.error, *(self.trajectory or ()))
        return [x for x in found if x is not None]
