"""The engine contract for masked autoregressive transforms: a token is a dimension, after a start token.

The dimensions are in the order in which they become known (`masked/sorting.py`). Where a step makes several known at
once, they are tokens after one another all the same. What a transformer keeps as keys and values, these engines keep as
units of the network: a pass over the tokens [start, stop) evaluates the units of the steps that these belong to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..masked.sorting import SortedTransform
from .base import PlainEngine
from .contract import BlockState, Condition, Moved, Progress
from .windows import Bounds, check_part, check_window


@dataclass(frozen=True)
class ContextCondition(Condition):
    """A condition with a context.

    Attributes:
        context: (B, C), or (1, C) for one that all samples share, or None.
    """

    context: Tensor | None = None


def enter(transform: SortedTransform, z: Tensor) -> Tensor:
    """Returns tokens, (B, D + 1, 1), of dimensions z, (B, D): a start token of 0, then the dimensions as they come."""
    return torch.nn.functional.pad(z[:, transform.dims], (1, 0)).unsqueeze(-1)


def leave(transform: SortedTransform, x: Tensor) -> Tensor:
    """Returns dimensions, (B, D), of tokens x, (B, D + 1, 1); it inverts `enter`."""
    return x[:, 1:, 0][:, torch.argsort(transform.dims)]


class MaskedEngine(PlainEngine):
    """The parts of `BlockEngine` that engines of masked transforms share.

    An engine makes `memory`, `solve` and `guess` its own.

    Args:
        transform: The transform, sorted.
        dtype: The dtype of the weights.
        device: The device of the state's tensors.
    """

    def __init__(self, transform: SortedTransform, dtype: torch.dtype, device: torch.device):
        self.transform, self.dtype, self.device = transform, dtype, device

    @property
    def tokens(self) -> int:
        """Returns T = D + 1."""
        return len(self.transform.dims) + 1

    def bytes_per_sample(self, guided: bool) -> int:
        """Returns the bytes of memory that a sample takes, see `BlockEngine.bytes_per_sample`."""
        units = sum(layer.weight.shape[1] + 3 * len(layer.bias) for layer in self.transform.layers)
        return (units + 6 * self.tokens) * self.dtype.itemsize

    def begin(self, z: Tensor, condition: Condition, reuse: BlockState | None = None) -> BlockState:
        """Returns the state of a batch, see `BlockEngine.begin`. z: (B, D + 1, 1). condition: its context is used."""
        if z.dim() != 3 or tuple(z.shape[1:]) != (self.tokens, 1):
            raise ArgumentError("z", f"shape (B, {self.tokens}, 1)", tuple(z.shape))
        z = z.detach().to(self.device, self.dtype).contiguous()
        context = condition.context if isinstance(condition, ContextCondition) else None
        cache, bytes = self.memory(len(z), context)
        return BlockState(z, z.clone(), z.new_zeros(z.shape[:2]), condition, cache, bytes)

    def reverse(
        self, state: BlockState, progress: Progress | None = None, start: int = 1, stop: int | None = None
    ) -> None:
        """Run the sequential pass over the tokens [start, stop), see `BlockEngine.reverse`."""
        stop = self.tokens if stop is None else stop
        check_part(start, stop, self.tokens)
        if start < stop:
            self.solve(state, start - 1, stop - 1)
        if progress is not None:
            progress(stop - start)

    def fixed_point(self, state: BlockState, start: Bounds, stop: Bounds) -> Moved:
        """Run one parallel pass over the tokens [start, stop), see `BlockEngine.fixed_point`."""
        first, end = check_window(start, stop, self.tokens)
        return self.guess(state, first - 1, end - 1)

    def memory(self, batch: int, context: Tensor | None) -> tuple[Any, int]:
        """Returns the engine's own memory for a batch, and how many bytes that is."""
        raise NotImplementedError

    def solve(self, state: BlockState, first: int, stop: int) -> None:
        """Make the dimensions [first, stop) known, one step after the other."""
        raise NotImplementedError

    def guess(self, state: BlockState, first: int, stop: int) -> Moved:
        """Make the dimensions [first, stop) from those of all steps before theirs as they stand."""
        raise NotImplementedError
