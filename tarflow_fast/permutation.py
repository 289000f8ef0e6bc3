"""The order in which a flow block reads the tokens: the data's own, its reverse, or any other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import host_ops
from .errors import ArgumentError


class Permutation:
    """A block's token order, called as ml-tarflow's `Permutation`.

    indices: (T,), which of the data's tokens the block reads as its i-th. Raises ArgumentError for another list.
    """

    def __init__(self, indices: Sequence[int]):
        self.indices = tuple(indices)
        tokens = len(self.indices)
        if sorted(self.indices) != list(range(tokens)):
            raise ArgumentError("indices", f"each of 0 to {tokens - 1} once", repr(self.indices[:20]))
        self._identity = self.indices == tuple(range(tokens))
        self._reversed = not self._identity and self.indices == tuple(reversed(range(tokens)))
        self._inverse = [0] * tokens
        for place, token in enumerate(self.indices):
            self._inverse[token] = place

    @classmethod
    def identity(cls, tokens: int) -> Permutation:
        """The data's own order of so many tokens."""
        return cls(range(tokens))

    @classmethod
    def reverse(cls, tokens: int) -> Permutation:
        """From the last of so many tokens to the first."""
        return cls(range(tokens - 1, -1, -1))

    @property
    def is_identity(self) -> bool:
        return self._identity

    @property
    def is_reverse(self) -> bool:
        """Whether tokens are read from the last to the first, and these are two at least."""
        return self._reversed

    def __call__(self, x: Tensor, dim: int = 1, inverse: bool = False) -> Tensor:
        """x with the tokens along `dim` in the block's order, or, inverse, back in the data's; autograd records it."""
        if self._identity:
            return x
        if self._reversed:
            return x.flip(dim)
        indices = self._inverse if inverse else self.indices
        return x.index_select(dim, torch.tensor(indices, device="cpu").to(x.device))

    def enter(self, x: Tensor) -> Tensor:
        """As `__call__` along dimension 1, contiguous and by one thread (see `host_ops.py`)."""
        return x if self._identity else host_ops.reordered(x, self.indices)

    def leave(self, x: Tensor) -> Tensor:
        """The inverse of `enter`."""
        return x if self._identity else host_ops.reordered(x, self._inverse)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Permutation) and self.indices == other.indices

    def __hash__(self) -> int:
        return hash(self.indices)

    def __repr__(self) -> str:
        tokens = len(self.indices)
        if self._identity or self._reversed:
            return f"Permutation.{'identity' if self._identity else 'reverse'}({tokens})"
        return f"Permutation({list(self.indices)})"


def check_permutation(given: object, own: Permutation) -> None:
    """Raises ArgumentError unless `given` reorders tokens as `own` does: trained weights go with their order."""
    tokens = torch.arange(len(own.indices), device="cpu").view(1, -1, 1)
    same = callable(given)
    if callable(given):
        try:
            same = all(torch.equal(given(tokens, inverse=way), own(tokens, inverse=way)) for way in (False, True))
        except Exception:  # whatever a foreign function raises, it is not this order
            same = False
    if not same:
        order = "the data's own order" if own.is_identity else "reversed order" if own.is_reverse else repr(own)
        raise ArgumentError("permutation", f"{order}, as this block was made: no other can be sampled", repr(given))
