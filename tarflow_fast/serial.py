"""Elementwise operations on tensors of tokens, done by one thread.

An engine for the CPU starts its own threads. After a parallel operation torch's OpenMP threads spin for milliseconds on
the cores that these need: without this module the inverse of 64 small images takes a third longer. So what is done to
tokens between two passes of an engine is done by numpy where it can be, and by torch on other devices and for bf16.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def _numpy(x: Tensor) -> np.ndarray | None:
    """A view of x."""
    return None if x.device.type != "cpu" or x.dtype == torch.bfloat16 else x.detach().numpy()


def all_finite(x: Tensor, start: int = 0) -> Tensor:
    """Whether no value is infinite or NaN, over the dimensions from `start` on; x.shape[:start] bool."""
    values = _numpy(x)
    if values is None:
        return torch.isfinite(x).flatten(start).all(-1)
    return torch.from_numpy(np.asarray(np.isfinite(values).all(axis=tuple(range(start, x.dim())))))


def copy(x: Tensor) -> Tensor:
    """A contiguous copy."""
    values = _numpy(x)
    return x.contiguous().clone() if values is None else torch.from_numpy(values.copy(order="C"))


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x · factor, of one dtype and device."""
    values, factors = _numpy(x), _numpy(factor)
    return x * factor if values is None or factors is None else torch.from_numpy(values * factors)


def flipped(x: Tensor) -> Tensor:
    """x (B, T, …) with its tokens in reverse order, as a copy."""
    values = _numpy(x)
    return x.flip(1).contiguous() if values is None else torch.from_numpy(values[:, ::-1].copy(order="C"))


def add_scaled(x: Tensor, direction: Tensor, factor: float) -> Tensor:
    """x + factor · direction, of one dtype and device."""
    values, steps = _numpy(x), _numpy(direction)
    return x + factor * direction if values is None or steps is None else torch.from_numpy(values + factor * steps)
