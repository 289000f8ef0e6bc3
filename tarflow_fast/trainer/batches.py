"""A training batch is a function of (seed, step) alone, whatever ran before and in however many processes."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from ..data import ImageData
from ..errors import ArgumentError
from ..models.pixels import dequantized, scaled
from .config import TrainConfig


def stream(seed: int, purpose: str, index: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Returns the random generator of one purpose ("order", "noise", …) and index (the epoch, the step)."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)


def add_noise(v: Tensor, noise_type: str, noise_std: float, noise: Tensor) -> Tensor:
    """x = v/127.5 − 1 + σ ε for "gaussian", x = (v + u)/128 − 1 for "uniform", x = v + σ ε for v that are no pictures.

    v: (B, ch, H, W) uint8, or float32 for data that are no pictures, sequences (B, T, D) among them. noise_type:
    "gaussian" or "uniform". noise_std: σ, on the scale of x. noise: fp32 of the same shape, ε ~ N(0, 1) or u ~ U[0, 1).
    Returns x, fp32.
    """
    if noise_type == "uniform":
        return dequantized(v.to(torch.float32), noise)
    if v.is_floating_point():
        return v + noise_std * noise
    return scaled(v.to(torch.float32)) + noise_std * noise


class Order:
    """`Order` gives the numbers of the data in batch number `step`: an epoch is a permutation cut into batches.

    count: how many data there are. size: how many are in a batch. seed: the seed of the permutations. world: the number
    of processes that share a batch. kind: what messages call the data. Raises ArgumentError for a batch size that
    cannot be.
    """

    def __init__(self, count: int, size: int, seed: int, world: int, kind: str):
        if size > count:
            raise ArgumentError("batch_size", f"at most {count}, the number of {kind}", size)
        if size % world:
            raise ArgumentError("batch_size", f"a multiple of the {world} processes", size)
        self.count, self.size, self.seed = count, size, seed
        self._epoch, self._order = -1, torch.empty(0, device="cpu")

    @property
    def steps_per_epoch(self) -> int:
        """The number of whole batches in the data; the rest of a permutation is left out, another rest every epoch."""
        return self.count // self.size

    def __call__(self, step: int) -> Tensor:
        """Returns (B,) int64 on the CPU."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = torch.randperm(self.count, generator=stream(self.seed, "order", epoch), device="cpu")
            self._epoch = epoch
        return self._order[position * self.size : (position + 1) * self.size]


class Batches:
    """`Batches` gives batch number `step`: images in the order of the epoch's permutation, noised, some labels dropped.

    Every process draws what is random for the whole batch of B images and keeps B/world rows from rank · B/world on:
    this costs little and makes the batch the same for any number of processes.

    data: the images to learn. config: the run. device: where the batches go. rank, world: the number of this process,
    and how many there are. Raises ArgumentError where the data do not go with the configuration.
    """

    def __init__(self, data: ImageData, config: TrainConfig, device: torch.device, rank: int, world: int):
        self.size = config.batch_size_for(len(data), world)
        self.order = Order(len(data), self.size, config.seed, world, data.kind)
        if data.images.is_floating_point() and config.noise_type == "uniform":
            raise ArgumentError("noise_type", "'gaussian', as only 8-bit values can be dequantised", "'uniform'")
        self.data, self.config, self.device = data, config, device
        rows = self.size // world
        self.rows = slice(rank * rows, (rank + 1) * rows)
        self.labels = data.labels if config.conditional else None
        if config.conditional and data.labels is None:
            raise ArgumentError("conditional", "False, as the data has no labels", True)

    @property
    def steps_per_epoch(self) -> int:
        """The number of whole batches in the data."""
        return self.order.steps_per_epoch

    def __call__(self, step: int) -> tuple[Tensor, Tensor | None]:
        """Returns (x, y), this process's rows of batch number `step`.

        x: (B/world, ch, H, W) fp32, or (B/world, T, D) for sequences. y: (B/world,) int64, -1 for a dropped label; None
        when unconditional.
        """
        config, B = self.config, self.size
        picked = self.order(step)[self.rows]
        v = self.data.images[picked].to(self.device)
        random = stream(config.seed, "noise", step, self.device)
        draw = torch.rand if config.noise_type == "uniform" else torch.randn
        how: dict[str, Any] = {"generator": random, "device": self.device, "dtype": torch.float32}
        noise = draw((B, *v.shape[1:]), **how)[self.rows]
        dropped = torch.rand(B, **how)[self.rows] < config.drop_label
        mirrored = torch.rand(B, **how)[self.rows] < 0.5
        if config.flip:
            v = torch.where(mirrored[:, None, None, None], v.flip(-1), v)
        x = add_noise(v, config.noise_type, config.noise_std, noise)
        return x, None if self.labels is None else self.labels[picked].to(self.device).masked_fill(dropped, -1)
