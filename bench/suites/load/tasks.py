"""What `bench load` runs on a quiet and on a busy machine: calls of the library, and whole commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tarflow_fast import Sampler, TarFlow, TarFlowError
from tarflow_fast.evaluation import Noise, bits_per_dim
from tarflow_fast.images import to_uint8
from tarflow_fast.solvers import TOL

from ...common.harness import ADAPTIVE_BOUND
from ...common.models import denoised, labels, with_density

Run = Callable[[], Tensor]
"""Runs the task once; the same tensor each time."""

EXACT = 2e-5  # what two implementations of fp32 may differ by, and so quiet and busy ones too
NOISE_STD = 0.1  # of models that record none


@dataclass(frozen=True)
class Inputs:
    """What the tasks of a run share.

    path: of the checkpoint, None for the shipped model. images: (batch, ch, H, W) fp32, drawn from the model; y: their
    labels or None. density: the backend of denoising and densities that the library is called with. folder: for files;
    "data.npz" in it holds the images in 8 bits.
    """

    model: TarFlow
    path: Path | None
    images: Tensor
    y: Tensor | None
    seed: int
    density: str
    folder: Path

    @classmethod
    def draw(cls, model: TarFlow, path: Path | None, batch: int, seed: int, density: str, folder: Path) -> Inputs:
        y = labels(model.config, batch)
        images = Sampler(model, solver="sequential").sample(batch, y, seed=seed).images
        arrays: dict[str, Any] = {} if y is None else {"labels": y.numpy()}
        arrays["images"] = to_uint8(images).permute(0, 2, 3, 1).numpy()
        np.savez(folder / "data.npz", **arrays)
        return cls(model, path, images, y, seed, density, folder)

    def command(self, threads: int, *arguments: object) -> str:
        """Returns what `tarflow-fast ARGUMENTS` prints, as a process of its own in which torch has so many threads."""
        chosen = [] if self.path is None else ["--model", self.path]
        command = [sys.executable, "-m", "tarflow_fast", *map(str, [*arguments, *chosen])]
        how: dict[str, Any] = {"env": {**os.environ, "OMP_NUM_THREADS": str(threads)}, "stdin": subprocess.DEVNULL}
        done = subprocess.run(command, capture_output=True, text=True, **how)
        if done.returncode:
            raise TarFlowError(f"tarflow-fast {arguments[0]} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout


def _sample(inputs: Inputs, threads: int) -> Run:
    sampler = Sampler(inputs.model, backend="cpu", solver="sequential", threads=threads)
    return lambda: sampler.sample(len(inputs.images), inputs.y, seed=inputs.seed).images


def _denoise(inputs: Inputs, threads: int) -> Run:
    noise_std = float(inputs.model.metadata.get("noise_std") or NOISE_STD)
    how: dict[str, Any] = {"noise_std": noise_std, "backend": inputs.density, "threads": threads}
    return lambda: denoised(inputs.model, inputs.images, inputs.y, **how)


def _log_prob(inputs: Inputs, threads: int) -> Run:
    log_prob = torch.no_grad()(with_density(inputs.model, inputs.density, threads).log_prob)
    return lambda: log_prob(inputs.images, inputs.y) / inputs.images[0].numel()


def _bits(inputs: Inputs, threads: int) -> Run:
    model = with_density(inputs.model, inputs.density, threads)
    pixels, noise = to_uint8(inputs.images), Noise.of(model)
    return lambda: torch.tensor([bits_per_dim(model, pixels, inputs.y, noise=noise).mean])


def _sample_command(inputs: Inputs, threads: int) -> Run:
    numbers = inputs.folder / "samples.npz"
    drawn = ("-n", len(inputs.images), "--seed", inputs.seed, "--backend", "cpu", "--threads", threads, "--quiet")
    files = ("--out", inputs.folder / "samples.png", "--npz", numbers)

    def run() -> Tensor:
        inputs.command(threads, "sample", *drawn, *files)
        with np.load(numbers) as file:
            return torch.from_numpy(file["images"])

    return run


def _eval_command(inputs: Inputs, threads: int) -> Run:
    arguments = ("eval", "--data", inputs.folder / "data.npz", "--device", "cpu", "--no-accuracy", "--json")
    return lambda: torch.tensor([json.loads(inputs.command(threads, *arguments))["bits_per_dim"]["mean"]])


class Task(NamedTuple):
    """make: the task on so many threads, ready to be run. tolerance: on differences between its results."""

    make: Callable[[Inputs, int], Run]
    tolerance: float = EXACT


TASKS = {
    "sample": Task(_sample),
    "denoise": Task(_denoise),
    "log_prob": Task(_log_prob),
    "bits_per_dim": Task(_bits),
    # by default the command takes the solver that is the quickest at the time, within what that one's tolerance allows
    "tarflow-fast sample": Task(_sample_command, ADAPTIVE_BOUND * TOL[torch.float32]),
    "tarflow-fast eval": Task(_eval_command),
}
