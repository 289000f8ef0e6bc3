"""What sampling returns: the images, and how they were made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import host_ops
from ..solvers import Solution


@dataclass
class BlockReport:
    """How one flow block was inverted, over all batches.

    passes: dependent steps of a batch, the most that one took. evaluations: tokens that the transformer was evaluated
    on. residual: the largest |forward(x) − z| of this block alone, 0 if exact, NaN if one is. window: the most tokens
    of an image in a pass, 1 in the sequential pass.
    """

    passes: int = 0
    evaluations: int = 0
    residual: float = 0.0
    window: int = 1

    def add(self, solution: Solution) -> None:
        """Counts a batch of this block."""
        most = float(solution.residual.max())
        self.merge(BlockReport(solution.passes, solution.evaluations, most, solution.window))

    def merge(self, other: BlockReport) -> None:
        self.passes = max(self.passes, other.passes)
        self.evaluations += other.evaluations
        self.residual = float(np.maximum(self.residual, other.residual))  # NaN if one is
        self.window = max(self.window, other.window)


@dataclass
class Report:
    """How samples were made.

    backend, backend_reason, solver, device, dtype: what ran, and why that backend, or those, where one was measured to
    be the quickest for each size of batch. batch_size: samples per batch.
    seconds: wall time of the inverse passes; setup_seconds: of what in them is done once for a batch size (compiling
    and choosing kernels, capturing graphs, measuring what passes cost), as far as it is known; denoise_seconds: of
    denoising. tokens: transformed, images · K · T. cache_bytes: KV cache of one block for one batch. redrawn: image
    number to how many times it was drawn again. blocks: how each flow block was inverted, by its index.
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
        return self.tokens / self.seconds if self.seconds else 0.0

    def merge(self, other: Report) -> None:
        """Adds what the same sampler did for other images."""
        if other.backend != self.backend:  # of several, each with its reason
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
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


@dataclass
class Samples:
    """What `Sampler.sample` returns, on the CPU, and what `Sampler.stream` yields, on the sampler's device.

    images: (n, in_channels, H, W) on the training scale, [-1, 1] for images, not clamped. log_prob: (n,) in nats, the
    model's log p(x | y) of each image before denoising; None under guidance, which draws from another distribution.
    labels: (n,) or None. error: (n,), how far values of an image may be from those of the sequential solver, before
    denoising, by `tol` and by rounding, as the parallel passes show it (an estimate: see `solvers/trail.py`); infinite
    where that is unknown, 0 if there were no such passes.
    trajectory: the latents, then the images after each block, [(n, in_channels, H, W)] * (K + 1), if asked for.
    """

    images: Tensor
    log_prob: Tensor | None
    labels: Tensor | None
    report: Report
    error: Tensor
    trajectory: list[Tensor] | None = None

    @classmethod
    def collect(cls, n: int, parts: Iterable[Samples]) -> Samples:
        """Parts of n >= 1 images in all, as one, on the CPU."""
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
        assert whole is not None
        return whole

    def _room_for(self, n: int) -> Samples:
        """Uninitialised memory for n images of this kind, and this report."""

        def room(x: Any) -> Any:
            return None if x is None else torch.empty((n, *x.shape[1:]), dtype=x.dtype, device="cpu")

        frames = None if self.trajectory is None else [room(x) for x in self.trajectory]
        labels, error = room(self.labels), room(self.error)
        return Samples(room(self.images), room(self.log_prob), labels, self.report, error, frames)

    def _tensors(self) -> list[Tensor]:
        """All that have a row for each image."""
        found = (self.images, self.log_prob, self.labels, self.error, *(self.trajectory or ()))
        return [x for x in found if x is not None]
