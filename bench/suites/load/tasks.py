"""What `bench load` runs on a quiet and on a busy machine: calls of the library, and whole commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

NOISE_STD = 0.1  # of models that record none


@dataclass(frozen=True)
class Inputs:
    """What the tasks of a run share.

    path is the checkpoint that the model is of, None for the shipped one. images: (batch, ch, H, W) fp32, drawn from
    the model; y: their labels or None. folder is for files; "data.npz" in it holds the images in 8 bits. density is the
    backend of denoising and densities that the library is called with.
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
        arrays: dict[str, Any] = {"images": to_uint8(images).permute(0, 2, 3, 1).numpy()}
        if y is not None:
            arrays["labels"] = y.numpy()
        np.savez(folder / "data.npz", **arrays)
        return cls(model, path, images, y, seed, density, folder)


@dataclass(frozen=True)
class Task:
    """make: the task on so many threads, ready to be run. tolerance: on differences between its results."""

    make: Callable[[Inputs, int], Run]
    tolerance: float


def _sample(inputs: Inputs, threads: int) -> Run:
    sampler = Sampler(inputs.model, backend="cpu", solver="sequential", threads=threads)
    return lambda: sampler.sample(len(inputs.images), inputs.y, seed=inputs.seed).images


def _denoise(inputs: Inputs, threads: int) -> Run:
    noise_std = float(inputs.model.metadata.get("noise_std") or NOISE_STD)
    how: dict[str, Any] = {"noise_std": noise_std, "backend": inputs.density, "threads": threads}
    return lambda: denoised(inputs.model, inputs.images, inputs.y, **how)


def _log_prob(inputs: Inputs, threads: int) -> Run:
    model = with_density(inputs.model, inputs.density, threads)
    return lambda: torch.no_grad()(model.log_prob)(inputs.images, inputs.y) / inputs.images[0].numel()


def _bits(inputs: Inputs, threads: int) -> Run:
    model = with_density(inputs.model, inputs.density, threads)
    pixels, noise = to_uint8(inputs.images), Noise.of(model)
    return lambda: torch.tensor([bits_per_dim(model, pixels, inputs.y, noise=noise).mean])


def _command(inputs: Inputs, threads: int, *arguments: str) -> str:
    """What `tarflow-fast ARGUMENTS` prints, as a process of its own in which torch too has so many threads."""
    chosen = [] if inputs.path is None else ["--model", str(inputs.path)]
    command = [sys.executable, "-m", "tarflow_fast", *arguments, *chosen]
    how: dict[str, Any] = {"env": {**os.environ, "OMP_NUM_THREADS": str(threads)}, "stdin": subprocess.DEVNULL}
    done = subprocess.run(command, capture_output=True, text=True, **how)
    if done.returncode:
        raise TarFlowError(f"tarflow-fast {arguments[0]} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def _sample_command(inputs: Inputs, threads: int) -> Run:
    grid, numbers = inputs.folder / "samples.png", inputs.folder / "samples.npz"
    drawn = ["-n", len(inputs.images), "--seed", inputs.seed, "--backend", "cpu", "--threads", threads]
    arguments = [*map(str, drawn), "--out", str(grid), "--npz", str(numbers), "--quiet"]

    def run() -> Tensor:
        _command(inputs, threads, "sample", *arguments)
        with np.load(numbers) as file:
            return torch.from_numpy(file["images"])

    return run


def _eval_command(inputs: Inputs, threads: int) -> Run:
    arguments = ["eval", "--data", str(inputs.folder / "data.npz"), "--device", "cpu", "--no-accuracy", "--json"]
    return lambda: torch.tensor([json.loads(_command(inputs, threads, *arguments))["bits_per_dim"]["mean"]])


EXACT = 2e-5  # what two implementations of fp32 may differ by, and so quiet and busy ones too
TASKS = {
    "sample": Task(_sample, EXACT),
    "denoise": Task(_denoise, EXACT),
    "log_prob": Task(_log_prob, EXACT),
    "bits_per_dim": Task(_bits, EXACT),
    # by default the command takes the solver that is the quickest at the time, within what that one's tolerance allows
    "tarflow-fast sample": Task(_sample_command, ADAPTIVE_BOUND * TOL[torch.float32]),
    "tarflow-fast eval": Task(_eval_command, EXACT),
}
