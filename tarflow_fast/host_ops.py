"""Operations on whole batches and weights, done by one thread.

After a parallel operation torch's OpenMP threads spin for milliseconds on the cores that an engine's own threads need,
and where another process takes a core each of them waits for the other. So what is done on a CPU between two passes of
an engine, and before and after them, is done by numpy where it can be: by torch on other devices, for bf16 and float8,
where autograd records, and where torch traces or transforms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_NUMPY = {torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool}


def _numpy(x: Tensor) -> np.ndarray | None:
    """A view of x without its gradient, or None where torch has to do it."""
    if x.device.type != "cpu" or x.dtype not in _NUMPY:
        return None
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return None
    return x.detach().numpy()


def _recorded(x: Tensor) -> bool:
    """Whether autograd is to record what is done to x."""
    return x.requires_grad and torch.is_grad_enabled()


def all_finite(x: Tensor, start: int = 0) -> Tensor:
    """Whether no value is infinite or NaN, over the dimensions from `start` on; x.shape[:start] bool."""
    values = _numpy(x)
    if values is None:
        return torch.isfinite(x).flatten(start).all(-1)
    return torch.from_numpy(np.asarray(np.isfinite(values).all(axis=tuple(range(start, x.dim())))))


def span(x: Tensor) -> tuple[float, float]:
    """The least and the largest value."""
    values = _numpy(x)
    return (float(x.min()), float(x.max())) if values is None else (float(values.min()), float(values.max()))


def copy(x: Tensor) -> Tensor:
    """A contiguous copy."""
    values = _numpy(x)
    return x.contiguous().clone() if values is None else torch.from_numpy(values.copy(order="C"))


def converted(x: Tensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """A detached copy on this device, of this dtype."""
    values = _numpy(x)
    if values is None or x.dtype != dtype or torch.device(device).type != "cpu":
        return x.detach().to(device, dtype, copy=True)
    return torch.from_numpy(values.copy(order="K"))


@np.errstate(all="ignore")  # as torch, which says nothing of overflow
def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x · factor, of one dtype and device."""
    values, factors = _numpy(x), _numpy(factor)
    return x * factor if values is None or factors is None else torch.from_numpy(values * factors)


@np.errstate(all="ignore")
def add_scaled(x: Tensor, direction: Tensor, factor: float) -> Tensor:
    """x + factor · direction, of one dtype and device."""
    values, steps = _numpy(x), _numpy(direction)
    return x + factor * direction if values is None or steps is None else torch.from_numpy(values + factor * steps)


def reordered(x: Tensor, indices: Sequence[int]) -> Tensor:
    """x (B, T, …) with the tokens of these indices, one after the other, as a contiguous copy."""
    values = _numpy(x)
    if values is None:
        return x.index_select(1, torch.tensor(indices, device="cpu").to(x.device))
    return torch.from_numpy(values.take(indices, axis=1))


def rearranged(x: Tensor, split: Sequence[int], order: Sequence[int], shape: Sequence[int]) -> Tensor:
    """x.reshape(split).permute(order).reshape(shape) as a copy, which autograd records."""
    values = None if _recorded(x) else _numpy(x)
    if values is None:
        return x.reshape(split).permute(*order).clone(memory_format=torch.contiguous_format).reshape(shape)
    return torch.from_numpy(values.reshape(split).transpose(order).copy(order="C").reshape(shape))


def rows_of(table: Tensor, rows: Tensor) -> Tensor:
    """table[rows]: (n, …) of rows (n,) int64, on one device."""
    values = _numpy(table)
    return table[rows] if values is None else torch.from_numpy(values[rows.numpy()])


def put_rows(target: Tensor, rows: Sequence[int], values: Tensor) -> None:
    """target[rows] = values, of one dtype and device."""
    to, new = _numpy(target), _numpy(values)
    if to is None or new is None:
        target[rows] = values
    else:
        to[rows] = new


@np.errstate(all="ignore")
def gaussian_log_prob(z: Tensor, var: Tensor) -> Tensor:
    """log N(z; 0, diag var) in nats, (B,), which autograd records.

    z: (B, T, D), var: (T, D), of one dtype and device.
    """
    values, variances = None if _recorded(z) else _numpy(z), _numpy(var)
    if values is None or variances is None:
        return -0.5 * (z.square() / var + (2 * math.pi * var).log()).sum(dim=(1, 2))
    return torch.from_numpy(-0.5 * (np.square(values) / variances + np.log(2 * math.pi * variances)).sum(axis=(1, 2)))
