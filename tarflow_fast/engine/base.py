"""The base class of engines: the parts that the engines of all backends have in common."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .contract import BlockState, Condition, check_latents
from .shape import BlockShape


class Choice(NamedTuple):
    """The name of the engine that serves a size of batch, and the reason why it does."""

    name: str
    why: str


class PlainEngine:
    """The parts of `BlockEngine` that stand for nothing: no setup, no memory between batches, no engine chosen."""

    ragged: bool = False

    @property
    def setup_seconds(self) -> float:
        """Returns the seconds spent so far on setup, here none."""
        return 0.0

    @property
    def cached_bytes(self) -> int:
        """Returns the bytes that are held for later batches, here none."""
        return 0

    def empty_cache(self) -> None:
        """Free what `cached_bytes` counts, here nothing."""

    def served_by(self, batch: int, guided: bool) -> Choice | None:
        """Returns which of several engines serves such a batch, or None where this engine does."""
        return None


class EngineBase(PlainEngine):
    """The parts of `BlockEngine` that most engines of blocks share.

    An engine holds no memory between batches and has no setup unless it overrides this.

    device: the device of the state's tensors. dtype: the dtype of weights and KV cache.
    """

    shape: BlockShape
    device: torch.device
    dtype: torch.dtype

    @staticmethod
    def branches(condition: Condition) -> int:
        """Returns the number of KV cache rows for each sample: 2 when guided, one for each branch, else 1."""
        return 2 if condition.guidance.active else 1

    def latents(self, z: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns z detached and contiguous, (B, T, D), on the engine's device in this dtype.

        Raises ArgumentError for another shape.
        """
        check_latents(z, self.shape)
        return z.detach().to(self.device, dtype).contiguous()

    def state(self, z: Tensor, x: Tensor, condition: Condition, cache: object, cache_bytes: int) -> BlockState:
        """Returns a new `BlockState` with log-dets of zero, as `begin` returns it. x: (B, T, D), a copy of z."""
        return BlockState(z, x, z.new_zeros(z.shape[:2]), condition, cache, cache_bytes)
