"""What the engines of all backends have in common."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .contract import BlockState, Condition, check_latents
from .shape import BlockShape


class Choice(NamedTuple):
    """Which engine serves a size of batch, and why."""

    name: str
    why: str


class EngineBase:
    """The parts of `BlockEngine` that most engines share: nothing is held between batches, or set up for them.

    device: where the state's tensors are. dtype: of weights and KV cache.
    """

    shape: BlockShape
    device: torch.device
    dtype: torch.dtype
    ragged: bool = False

    @property
    def setup_seconds(self) -> float:
        return 0.0

    @property
    def cached_bytes(self) -> int:
        return 0

    def empty_cache(self) -> None:
        """Nothing is held."""

    def served_by(self, batch: int, guided: bool) -> Choice | None:
        """Which of several engines serves such a batch; None where this one does."""
        return None

    @staticmethod
    def branches(condition: Condition) -> int:
        """Rows of the KV cache for each sample: the unguided branch has one of its own."""
        return 2 if condition.guidance.active else 1

    def latents(self, z: Tensor, dtype: torch.dtype) -> Tensor:
        """z, (B, T, D), on the device in this dtype. Raises ArgumentError for another shape."""
        check_latents(z, self.shape)
        return z.detach().to(self.device, dtype).contiguous()

    def state(self, z: Tensor, x: Tensor, condition: Condition, cache: object, cache_bytes: int) -> BlockState:
        """The state that `begin` returns. x: a copy of z."""
        return BlockState(z, x, z.new_zeros(z.shape[:2]), condition, cache, cache_bytes)
