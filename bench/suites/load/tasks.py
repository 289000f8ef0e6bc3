"""What `bench load` runs on a quiet and on a busy machine: calls of the library, and whole commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tarflow_fast import Sampler, TarFlow, TarFlowError
from tarflow_fast.evaluation import Noise, bits_per_dim
from tarflow_fast.images import to_uint8
from tarflow_fast.solvers import TOL

from ...common import models
from ...common.harness import ADAPTIVE_BOUND

Run = Callable[[], Tensor]
"""Runs a task once; the same tensor each time."""


class Tasks:
    """The tasks of a run: each method makes one on so many threads, ready to be run.

    path: the checkpoint of the model, None for the shipped one. density: the backend of densities. The images of all
    tasks, (batch, ch, H, W) fp32, are drawn from the model; "data.npz" in the folder has them in 8 bits.
    """

    def __init__(self, model: TarFlow, path: Path | None, batch: int, seed: int, density: str, folder: Path):
        self.model, self.path, self.seed, self.density, self.folder = model, path, seed, density, folder
        _, self.y = models.inputs(model.config, batch, seed)
        self.images = Sampler(model, solver="sequential").sample(batch, self.y, seed=seed).images
        self.pixels = to_uint8(self.images)
        arrays: dict[str, Any] = {} if self.y is None else {"labels": self.y.numpy()}
        np.savez(folder / "data.npz", images=self.pixels.permute(0, 2, 3, 1).numpy(), **arrays)

    def sample(self, threads: int) -> Run:
        sampler = Sampler(self.model, backend="cpu", solver="sequential", threads=threads)
        return lambda: sampler.sample(len(self.images), self.y, seed=self.seed).images

    def denoise(self, threads: int) -> Run:
        noise_std = float(self.model.metadata.get("noise_std") or models.NOISE_STD)
        given = (self.model, self.images, self.y, self.density, threads)
        return models.density("denoise", *given, noise_std=noise_std)

    def log_prob(self, threads: int) -> Run:
        run = models.density("log_prob", self.model, self.images, self.y, self.density, threads)
        return lambda: run() / self.images[0].numel()

    def bits_per_dim(self, threads: int) -> Run:
        model = models.with_density(self.model, self.density, threads)
        return lambda: torch.tensor([bits_per_dim(model, self.pixels, self.y, noise=Noise.of(model)).mean])

    def sample_command(self, threads: int) -> Run:
        numbers = self.folder / "samples.npz"
        drawn = ("-n", len(self.images), "--seed", self.seed, "--backend", "cpu", "--threads", threads, "--quiet")

        def run() -> Tensor:
            self.command(threads, "sample", *drawn, "--out", self.folder / "samples.png", "--npz", numbers)
            with np.load(numbers) as file:
                return torch.from_numpy(file["images"])

        return run

    def eval_command(self, threads: int) -> Run:
        arguments = ("eval", "--data", self.folder / "data.npz", "--device", "cpu", "--no-accuracy", "--json")
        return lambda: torch.tensor([json.loads(self.command(threads, *arguments))["bits_per_dim"]["mean"]])

    def command(self, threads: int, *arguments: object) -> str:
        """Returns what `tarflow-fast ARGUMENTS` prints, as a process of its own in which torch has so many threads."""
        chosen = [] if self.path is None else ["--model", self.path]
        command = [sys.executable, "-m", "tarflow_fast", *map(str, [*arguments, *chosen])]
        how: dict[str, Any] = {"env": {**os.environ, "OMP_NUM_THREADS": str(threads)}, "stdin": subprocess.DEVNULL}
        done = subprocess.run(command, capture_output=True, text=True, **how)
        if done.returncode:
            raise TarFlowError(f"tarflow-fast {arguments[0]} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout


EXACT = 2e-5  # what two implementations of fp32 may differ by, and so quiet and busy ones too
# By default the command takes the solver that is the quickest at the time, within what that one's tolerance allows.
QUICKEST = ADAPTIVE_BOUND * TOL[torch.float32]
TASKS: dict[str, tuple[Callable[[Tasks, int], Run], float]] = {
    "sample": (Tasks.sample, EXACT),
    "denoise": (Tasks.denoise, EXACT),
    "log_prob": (Tasks.log_prob, EXACT),
    "bits_per_dim": (Tasks.bits_per_dim, EXACT),
    "tarflow-fast sample": (Tasks.sample_command, QUICKEST),
    "tarflow-fast eval": (Tasks.eval_command, EXACT),
}
"""What makes each task, and the tolerance on differences between its results."""
