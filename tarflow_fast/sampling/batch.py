"""One batch of images is drawn: their noise, the inverse, what is drawn again, denoising, and the report of it."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from .. import host_ops
from ..checks import batch_labels, check_count, check_dense, check_tensor, kind_of, short
from ..dtypes import residual_dtype
from ..engine import BlockEngine, Condition, Guidance
from ..engine.backend import Request
from ..errors import ArgumentError, NonFiniteError
from ..flow import Flow
from ..forking import safe_in_forked_child
from ..probe import naming_faults
from ..progress import Bar
from ..solvers import Solver, Solvers
from .inverse import Inverse, invert
from .noise import latent_noise
from .report import BlockReport, Report, Samples
from .rule import Rule

MAX_REDRAWS = 3


class BatchSampler:
    """A `BatchSampler` draws the images of one batch; a `Sampler` is one, and says what the attributes are."""

    flow: Flow
    engines: list[BlockEngine]
    solvers: Solvers
    device: torch.device
    dtype: torch.dtype
    backend: str
    backend_reason: str
    solver: str
    _threads: int | None
    _request: Request

    def _draw(self, numbers: range, labels: Tensor | None, seed: int, rule: Rule, batch: int, bar: Any) -> Samples:
        """Returns the images of these numbers, before denoising.

        labels: (len(numbers),) on the CPU, or None. batch: the most images of one pass, for the report. bar: what
        progress is shown on.
        """
        guidance, trajectory = rule.guidance, rule.trajectory
        report = self._report(batch)
        n, (T, D) = len(numbers), self.flow.latent_shape
        y = None if labels is None else labels.to(self.device)
        images = torch.empty((n, *self.flow.data_shape), device=self.device, dtype=residual_dtype(self.dtype))
        log_prob = None if guidance.active else images.new_empty(n)
        error = torch.empty(n, device="cpu", dtype=torch.float32)
        sequence = [torch.empty_like(images) for _ in range(len(self.flow.stages) + 1)] if trajectory else None
        sizes: list[int] = []  # how many rows each attempt draws
        rows = list(range(n))  # the rows that still have to be drawn
        started, setup = time.perf_counter(), self._setup_seconds()
        for attempt in range(MAX_REDRAWS + 1):
            z = latent_noise(seed, [numbers[row] for row in rows], T, D, attempt)
            part = self._invert(z, None if y is None else y[rows], guidance, bar, trajectory)
            sizes.append(len(rows))
            report.tokens += len(rows) * self.flow.block_tokens
            for k, solution in part.solutions.items():
                report.blocks[k].add(solution)
            report.cache_bytes = max(report.cache_bytes, part.cache_bytes)
            host_ops.put_rows(images, rows, part.data)
            error[rows] = part.error
            if log_prob is not None and part.log_prob is not None:
                log_prob[rows] = part.log_prob
            if sequence is not None:
                for whole, piece in zip(sequence, part.sequence, strict=True):
                    host_ops.put_rows(whole, rows, piece)
            if not part.failures:
                break
            if not rule.redraw or attempt == MAX_REDRAWS:
                row = min(part.failures)
                raise NonFiniteError(*part.failures[row], numbers[rows[row]])
            rows = [rows[row] for row in sorted(part.failures)]
            report.redrawn.update({numbers[row]: attempt + 1 for row in rows})
        report.seconds = time.perf_counter() - started
        report.backend, report.backend_reason = self._served_by(sizes, guidance.active)
        report.setup_seconds = self._setup_seconds() - setup
        return Samples(images, log_prob, labels, report, error, sequence)

    def _denoise(self, part: Samples, rule: Rule) -> None:
        """Puts denoised images into `part`, and the time that they took into its report."""
        started = time.perf_counter()
        assert self.flow.denoise is not None
        self.flow.check_unchanged(False)
        part.images = self.flow.denoise(
            part.images,
            part.labels,
            noise_std=rule.noise_std,
            scale=rule.denoise_scale,
            batch_size=None if self.backend == "cpu" else min(part.report.batch_size, 16),
            dtype=self.dtype,
            backend="cpu" if self.backend == "cpu" else "torch",
            threads=self._threads,
        )
        part.report.denoise_seconds = time.perf_counter() - started

    def with_solvers(self, solvers: Sequence[Solver]) -> Self:
        """Returns a sampler that shares this one's weights and engines, and inverts block k by solvers[k].

        Copies and pickles of it have the solvers of the sampler that it was made of.
        """
        if not isinstance(solvers, Sequence) or not all(map(callable, solvers)):
            raise ArgumentError("solvers", "a sequence of solvers", repr(solvers))
        if len(solvers) != len(self.engines):
            raise ArgumentError("solvers", f"one for each of the {len(self.engines)} blocks", len(solvers))
        new = copy.copy(self)
        new.solvers = Solvers(solvers)
        return new

    @torch.no_grad()
    def invert_block(self, k: int, z: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """Inverts block k, in its own token order, on this sampler's device.

        Args:
            k: The index of the block, from 0.
            z: (B, T, D) latents of the block, not mutated; with a start token T is one more than the data's.
            condition: The labels and guidance of the batch.

        Returns:
            x (B, T, D) and its token log-dets (B, T), Σ_d xa in nats.

        Raises:
            ArgumentError: There is no such block, an argument has the wrong type or shape, or the model does not have
                one of the labels.
        """
        k = check_count("k", k, 0, len(self.engines) - 1)
        shape = self.flow.stages[k].shape
        z = check_tensor("z", z, (shape.tokens, shape.token_dim), finite=False)
        check_dense("z", z)
        if not isinstance(condition, Condition):
            raise ArgumentError("condition", "a Condition", kind_of(condition))
        labels = batch_labels(condition.labels, len(z), self.flow.num_classes, self.device, "labels")
        z = z.to(self.device, residual_dtype(self.dtype))
        state = self.engines[k].begin(z, Condition(labels, condition.guidance))
        self.solvers[k](self.engines[k], state, None)
        return state.x, state.token_log_det

    @safe_in_forked_child()
    def _invert(self, z: Tensor, y: Tensor | None, guidance: Guidance, bar: Any, trajectory: bool) -> Inverse:
        """Takes one batch through all blocks. z: (B, T, D) on any device; y: (B,) on the sampler's device, or None."""
        z = z.detach().to(self.device, residual_dtype(self.dtype))
        advance, condition = None if bar is None else bar.update, Condition(y, guidance)

        def served() -> str:
            return self._served_by([len(z)], guidance.active)[0]

        with naming_faults(served, [stage.shape for stage in self.flow.stages], self._request):
            return invert(self.flow, self.engines, self.solvers, z, condition, progress=advance, trajectory=trajectory)

    def _served_by(self, sizes: list[int], guided: bool) -> tuple[str, str]:
        """Returns which backends served batches of these sizes, and why."""
        served: dict[str, str] = {}
        for size in sizes:
            choice = self.engines[-1].served_by(size, guided)
            if choice is None:
                return self.backend, self.backend_reason
            served.setdefault(*choice)
        return ", ".join(served), "; ".join(served.values())

    def _setup_seconds(self) -> float:
        """Returns the seconds that engines and solvers have spent so far on what is done once."""
        return sum(engine.setup_seconds for engine in self.engines) + self.solvers.setup_seconds

    def _report(self, batch: int) -> Report:
        """Returns a report of batches of this size, before anything is drawn."""
        return Report(
            self.backend,
            self.backend_reason,
            self.solver,
            str(self.device),
            short(self.dtype),
            batch,
            blocks=[BlockReport() for _ in self.flow.stages],
        )

    def _bar(self, n: int, progress: bool) -> Any:
        """Returns a progress bar over the tokens that the blocks of n images transform."""
        total = n * (self.flow.block_tokens - len(self.flow.stages))
        return Bar(total=total, unit="token", unit_scale=True, desc="sampling", disable=not progress)
