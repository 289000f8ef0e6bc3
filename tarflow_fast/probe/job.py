"""The job of a probe, which is sent to the process that does it, and the time that it may take."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..engine.backend import Backend
from ..engine.shape import BlockShape
from ..engine.verdict import Size

ROWS = (1, 8, 9, 16, 17, 32, 33, 64, 65)
"""The numbers of rows at which kernels for GPUs change their tiles, number of warps, or number of launches."""


class Limits(NamedTuple):
    """How many seconds a probe may take, after which its process is ended.

    Attributes:
        start: The time for the process to start, import torch and reach the device.
        check: The time for one check, in which kernels may have to be compiled and tuned.
        total: The time for all of it.
    """

    start: float = 120.0
    check: float = 180.0
    total: float = 600.0


@dataclass(frozen=True)
class EngineJob:
    """A job that probes the engines of a backend.

    Attributes:
        backend: The backend, or its name where it is one of the package's own.
        default: The name of the backend that serves where this one does not, whose time is compared.
        device: The device.
        dtype: The dtype of weights and KV cache.
        precision: The precision of fp32 products, as `torch.get_float32_matmul_precision` gives it.
        shapes: The sizes of the blocks, each once.
        size: The size of batch that is asked for.
        repeats: How often a pass is repeated that is to give the same bits.
        seed: The seed of the weights and inputs.
    """

    backend: Backend | str
    default: str
    device: torch.device
    dtype: torch.dtype
    precision: str
    shapes: tuple[BlockShape, ...]
    size: Size
    repeats: int = 50
    seed: int = 0

    @property
    def name(self) -> str:
        """Returns the name of the backend."""
        return self.backend if isinstance(self.backend, str) else self.backend.name

    @property
    def batches(self) -> list[int]:
        """Returns the numbers of samples that accuracy is checked at: the one that is asked for first, then all in its
        bucket at which kernels change.
        """
        branches, bucket = 2 if self.size.guided else 1, self.size.bucket.batch
        edges = {-(-rows // branches) for rows in ROWS}
        return [self.size.batch, *sorted(b for b in edges - {self.size.batch} if bucket // 2 < b <= bucket)]


@dataclass(frozen=True)
class DensityJob:
    """A job that probes the kernel of the affine transform of the density pass (`kernels/affine_density.py`).

    Attributes:
        device: The device.
        tokens: T, the number of tokens.
        token_dim: D, the number of values of a token.
        affine: Whether tokens are scaled as well as shifted.
        repeats: How often a pass is repeated that is to give the same bits.
    """

    device: torch.device
    tokens: int
    token_dim: int
    affine: bool
    repeats: int = 50
    name: str = field(default="affine_density", init=False)


Job = EngineJob | DensityJob
