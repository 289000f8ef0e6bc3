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

from tarflow_fast import Sampler, TarFlow, TarFlowError, denoise
from tarflow_fast.evaluation import Noise, bits_per_dim
from tarflow_fast.images import to_uint8
from tarflow_fast.solvers import TOL

from ...common import models
from ...common.harness import ADAPTIVE_BOUND

NOISE_STD = 0.1  # of denoising, where a model records none


class Tasks:
    """The tasks of a run: each method does one, on as many threads as torch has, and returns the same each time.

    path: the checkpoint of the model, None for the shipped one. The images of all tasks, (batch, ch, H, W) fp32, are
    drawn from the model; "data.npz" in the folder has them in 8 bits.
    """

    def __init__(self, model: TarFlow, path: Path | None, batch: int, seed: int, folder: Path):
        self.model, self.path, self.seed, self.folder = model, path, seed, folder
        self.sampler = Sampler(model, backend="cpu", solver="sequential")
        _, self.y = models.inputs(model.config, batch, seed)
        self.images = self.sampler.sample(batch, self.y, seed=seed).images
        self.pixels = to_uint8(self.images)
        arrays: dict[str, Any] = {} if self.y is None else {"labels": self.y.numpy()}
        np.savez(folder / "data.npz", images=self.pixels.permute(0, 2, 3, 1).numpy(), **arrays)

    def sample(self) -> Tensor:
        return self.sampler.sample(len(self.images), self.y, seed=self.seed).images

    def denoise(self) -> Tensor:
        noise_std = float(self.model.metadata.get("noise_std") or NOISE_STD)
        return denoise(self.model, self.images, self.y, noise_std=noise_std, batch_size=len(self.images))

    @torch.no_grad()
    def log_prob(self) -> Tensor:
        return self.model.log_prob(self.images, self.y) / self.images[0].numel()

    def bits_per_dim(self) -> Tensor:
        return torch.tensor([bits_per_dim(self.model, self.pixels, self.y, noise=Noise.of(self.model)).mean])

    def sample_command(self) -> Tensor:
        numbers, threads = self.folder / "samples.npz", torch.get_num_threads()
        drawn = ("-n", len(self.images), "--seed", self.seed, "--backend", "cpu", "--threads", threads, "--quiet")
        self.command("sample", *drawn, "--out", self.folder / "samples.png", "--npz", numbers)
        with np.load(numbers) as file:
            return torch.from_numpy(file["images"])

    def eval_command(self) -> Tensor:
        arguments = ("eval", "--data", self.folder / "data.npz", "--device", "cpu", "--no-accuracy", "--json")
        return torch.tensor([json.loads(self.command(*arguments))["bits_per_dim"]["mean"]])

    def command(self, *arguments: object) -> str:
        """Returns what `tarflow-fast ARGUMENTS` prints, as a process of its own in which torch has as many threads."""
        chosen = [] if self.path is None else ["--model", self.path]
        command = [sys.executable, "-m", "tarflow_fast", *map(str, [*arguments, *chosen])]
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise TarFlowError(f"tarflow-fast {arguments[0]} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout


EXACT = 2e-5  # what two implementations of fp32 may differ by, and so quiet and busy ones too
QUICKEST = ADAPTIVE_BOUND * TOL[torch.float32]  # the command takes the solver that is the quickest at the time
TASKS: dict[str, tuple[Callable[[Tasks], Tensor], float]] = {
    "sample": (Tasks.sample, EXACT),
    "denoise": (Tasks.denoise, EXACT),
    "log_prob": (Tasks.log_prob, EXACT),
    "bits_per_dim": (Tasks.bits_per_dim, EXACT),
    "tarflow-fast sample": (Tasks.sample_command, QUICKEST),
    "tarflow-fast eval": (Tasks.eval_command, EXACT),
}
"""Each task, and the tolerance on differences between its results."""
