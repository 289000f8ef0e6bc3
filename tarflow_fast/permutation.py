"""The order in which a flow block reads the tokens: the image's own, or its reverse."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ArgumentError


@dataclass(frozen=True)
class Permutation:
    """A block's token order, called as ml-tarflow's `Permutation`. seq_length: T; flip: whether it is reversed."""

    seq_length: int
    flip: bool

    def __call__(self, x: Tensor, dim: int = 1, inverse: bool = False) -> Tensor:
        """x with the tokens along `dim` in the block's order, or, inverse, back in the image's."""
        return x.flip(dim) if self.flip else x


def check_permutation(given: object, own: Permutation) -> None:
    """Raises ArgumentError unless `given` reorders tokens as `own` does: trained weights go with their order, and the
    sampler and the passes in C++ know no other."""
    tokens = torch.arange(own.seq_length, device="cpu").view(1, -1, 1)
    same = callable(given)
    if callable(given):
        try:
            same = all(torch.equal(given(tokens, inverse=inverse), own(tokens)) for inverse in (False, True))
        except Exception:  # whatever a foreign function raises, it is not this order
            same = False
    if not same:
        order = "reversed order" if own.flip else "the image's own order"
        raise ArgumentError("permutation", f"{order}, as this block was made: no other can be sampled", repr(given))
