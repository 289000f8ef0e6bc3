"""What sampling returns: the images, and how they were made."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .solvers import Solution


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
        self.passes = max(self.passes, solution.passes)
        self.evaluations += solution.evaluations
        self.residual = float(torch.maximum(torch.tensor(self.residual), solution.residual.max()))  # keeps NaN
        self.window = max(self.window, solution.window)


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

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


@dataclass
class Samples:
    """What `Sampler.sample` returns.

    images: (n, in_channels, H, W) on the training scale, [-1, 1] for images, not clamped. log_prob: (n,) in nats, the
    model's log p(x | y) of each image before denoising; None under guidance, which draws from another distribution.
    labels: (n,) or None. error: (n,), how far values of an image may be from those of the sequential solver, before
    denoising and up to rounding, as the parallel passes show it (see `solvers/trail.py`); 0 if there were none.
    trajectory: the latents, then the images after each block, [(n, in_channels, H, W)] * (K + 1), if asked for.
    """

    images: Tensor
    log_prob: Tensor | None
    labels: Tensor | None
    report: Report
    error: Tensor
    trajectory: list[Tensor] | None = None
