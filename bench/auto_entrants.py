"""Who takes part in `bench auto`: a batch of a model, inverted under one solver for all blocks or as auto chooses."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tarflow_fast import Sampler, TarFlow
from tarflow_fast.sampling.noise import latent_noise
from tarflow_fast.sampling.report import Report
from tarflow_fast.solvers import Solver

from . import timing
from .cpu import DTYPES
from .trials import admit

BASELINE, AUTO, PLANNED = "sequential", "auto", "auto with plan"
BOUND = 1e-3  # fp32: what the default tol promises of trained weights
BOUND_IMAGES = 16


@dataclass(frozen=True)
class Problem:
    """A batch of a model. Labels go round the classes and "no class"."""

    name: str
    model: TarFlow
    dtype: str
    batch: int
    backend: str
    device: torch.device
    seed: int

    @property
    def label(self) -> dict[str, Any]:
        return {"model": self.name, "dtype": self.dtype, "batch": self.batch}

    @property
    def tokens(self) -> int:
        return self.model.config.num_patches

    @property
    def labels(self) -> list[int] | None:
        classes = self.model.config.num_classes
        return [*range(classes), -1] if classes else None

    @functools.cached_property
    def z(self) -> Tensor:
        """(B, T, D), what `Sampler.sample` draws."""
        return latent_noise(self.seed, range(self.batch), self.tokens, self.model.config.token_dim).to(self.device)

    @functools.cached_property
    def y(self) -> Tensor | None:
        labels = self.labels
        if labels is None:
            return None
        return torch.tensor(labels, device=self.device)[torch.arange(self.batch, device=self.device) % len(labels)]

    def sampler(self, solver: str, dtype: str | None = None) -> Sampler:
        """dtype: default the problem's own."""
        kind = DTYPES[dtype or self.dtype]
        return Sampler(self.model, backend=self.backend, device=self.device, dtype=kind, solver=solver)

    def yardstick(self) -> tuple[Tensor, float]:
        """Images of the sequential pass in the problem's dtype, and how far from them others may be.

        In bf16 twice what that pass is off from fp32, as two results may be that are both as far off, and half a unit.
        The largest difference of one image says little about a dtype: that is of BOUND_IMAGES at least.
        """
        if self.dtype == "float32":
            return self._sequential(self.dtype), BOUND
        enough = replace(self, batch=max(self.batch, BOUND_IMAGES))
        wanted = enough._sequential(self.dtype)
        off = float((wanted - enough._sequential("float32")).abs().max())
        allowed = 2 * off + 0.5 * torch.finfo(DTYPES[self.dtype]).eps * float(wanted.abs().max())
        return wanted[: self.batch], allowed

    def _sequential(self, dtype: str) -> Tensor:
        return self.sampler(BASELINE, dtype).reverse(self.z, self.y)


@dataclass
class Entrant:
    """seconds: of the runs that were checked, without set-up. error: the largest of them. reason: why the last run
    failed, None if it did not. report: of the last run."""

    name: str
    problem: Problem
    sampler: Sampler
    seconds: list[float] = field(default_factory=list)
    error: float | None = None
    reason: str | None = None
    report: Report | None = None

    @classmethod
    def fixed(cls, name: str, auto: Entrant, solvers: Sequence[Solver]) -> Entrant:
        """With auto's engines, so that weights are as warm in the caches for all."""
        sampler = copy.copy(auto.sampler)
        sampler._solvers = list(solvers)
        return cls(name, auto.problem, sampler)

    def reverse(self) -> object:
        """What is timed."""
        return self.sampler.reverse(self.problem.z, self.problem.y)

    def sample(self) -> Tensor:
        """The same images, with a report."""
        problem = self.problem
        n = problem.batch
        samples = self.sampler.sample(n, problem.labels, seed=problem.seed, batch_size=n)
        self.report = samples.report
        return samples.images

    def run(self, wanted: Tensor, allowed: float) -> bool:
        """Once, checked."""
        trial = admit(lambda: self.sample, wanted, allowed, timing.wall)
        self.reason = trial.reason
        if trial.error is not None:
            self.error = max(trial.error, self.error or 0.0)
        if self.reason is None and self.report is not None:
            self.seconds.append(self.report.seconds - self.report.setup_seconds)
        return self.reason is None

    def windows(self) -> list[int]:
        """By block; 1 is the sequential pass."""
        return [] if self.report is None else [block.window for block in self.report.blocks]

    def entry(self, samples: Mapping[str, list[float]]) -> dict[str, Any]:
        """A run of the record."""
        seconds = samples.get(self.name, self.seconds)
        blocks = [] if self.report is None else self.report.blocks
        run: dict[str, Any] = {
            "name": self.name,
            "seconds": seconds,
            **timing.spread(seconds),
            "passes": sum(block.passes for block in blocks),
            "evaluations": sum(block.evaluations for block in blocks) / self.problem.batch,
            "max_error": self.error,
            "blocks": [asdict(block) for block in blocks],
        }
        if self.name in samples and self.name != BASELINE:
            ratios = timing.pairwise_ratios(samples[BASELINE], seconds)
            run["ratio"] = {"samples": ratios, **timing.spread(ratios)}
        return run
