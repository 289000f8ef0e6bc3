"""The laws of a TarFlow's weights: which there are, of which shapes, with finite values, causal masks, and a prior.

They hold for a state dict in memory and for one in a file, of which no more is read than has to be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from .. import host_ops
from ..errors import CheckpointError, some


class Shaped(Protocol):
    """A tensor, in memory or in a file."""

    @property
    def shape(self) -> Sequence[int]: ...


def is_mask(key: str) -> bool:
    """Returns whether this is the causal mask that ml-tarflow stores with every block, and that no pass here reads."""
    return key.endswith(".attn_mask")


def check_names(state: Mapping[str, Shaped], shapes: Mapping[str, Sequence[int]]) -> None:
    """Raises CheckpointError unless the state dict has tensors of these names and shapes, and no others.

    Masks may be left out; their shapes are `check_masks`' to see.
    """
    missing = [key for key in shapes if key not in state and not is_mask(key)]
    if missing:
        raise CheckpointError(f"incomplete: {len(missing)} tensors are missing, {some(missing)}")
    foreign = [key for key in state if key not in shapes]
    if foreign:
        raise CheckpointError(f"not a TarFlow of these sizes: {len(foreign)} unknown tensors, {some(foreign)}")
    for key, shape in shapes.items():
        if not is_mask(key) and tuple(state[key].shape) != tuple(shape):
            raise CheckpointError(f"{key}: expected shape {tuple(shape)}, got {tuple(state[key].shape)}")


def check_masks(state: Mapping[str, Shaped], tokens: int, read: Callable[[str], Tensor]) -> None:
    """Raises CheckpointError for a mask that is not the causal one, (T, T): attention here looks at no other.

    tokens: T. read: a function that returns the tensor of that name.
    """
    causal = np.tri(tokens, tokens, dtype=np.bool_)
    for key in filter(is_mask, state):
        got = f"shape {tuple(state[key].shape)}"
        if tuple(state[key].shape) == causal.shape:
            if np.array_equal(read(key).detach().to("cpu").float().numpy() != 0, causal):
                continue
            got = "another"
        raise CheckpointError(f"{key}: expected the causal mask, of shape {causal.shape}, got {got}")


def check_finite(key: str, value: Tensor) -> None:
    """Raises CheckpointError for a weight that has infinities or NaNs."""
    if not host_ops.all_finite(value):
        raise CheckpointError(f"{key}: expected finite weights, got infinities or NaNs")


def check_prior(var: Tensor) -> None:
    """Raises CheckpointError unless the variances of the prior are positive."""
    if not (var > 0).all():
        raise CheckpointError("var: expected positive variances, got some <= 0")
