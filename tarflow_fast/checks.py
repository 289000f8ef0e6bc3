"""Checks of arguments, shared by every public entry point. Each raises ArgumentError before any work is done."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import serial
from .errors import ArgumentError

Labels = int | Sequence[int] | Tensor | None

GUIDE_WHAT = ("a", "b", "ab")


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(name: str, x: object, shape: tuple[int, ...], *, finite: bool = True) -> Tensor:
    """x: a floating-point tensor of shape (B >= 1, *shape), of finite values unless finite=False.

    To look at the values is to wait for the device: the training path asks only for the shape.
    """
    wanted = "(B, " + ", ".join(map(str, shape)) + ")"
    if not isinstance(x, Tensor):
        raise ArgumentError(name, f"a tensor {wanted}", type(x).__name__)
    if not x.is_floating_point():
        raise ArgumentError(name, "a floating-point tensor", short(x.dtype))
    if x.dim() != len(shape) + 1 or tuple(x.shape[1:]) != shape or x.shape[0] == 0:
        raise ArgumentError(name, f"shape {wanted} with B >= 1", tuple(x.shape))
    if finite and not serial.all_finite(x.detach()):
        raise ArgumentError(name, "finite values", "a tensor with infinities or NaNs")
    return x


def check_number(
    name: str, value: object, low: float = -math.inf, high: float = math.inf, *, open_low: bool = False
) -> float:
    """A finite real number in [low, high], or in (low, high] when open_low."""
    bound = f"a finite number {'>' if open_low else '>='} {low:g}" + ("" if math.isinf(high) else f" and <= {high:g}")
    if math.isinf(low):
        bound = "a finite number"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ArgumentError(name, bound, repr(value))
    if value < low or value > high or (open_low and value == low):
        raise ArgumentError(name, bound, repr(value))
    return float(value)


def check_count(name: str, value: object, low: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ArgumentError(name, f"an integer >= {low}", repr(value))
    return value


def check_choice(name: str, value: object, choices: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ArgumentError(name, "one of " + ", ".join(map(repr, choices)), repr(value))
    return value


def label_tensor(labels: Labels, num_classes: int, name: str = "labels") -> Tensor | None:
    """One int, a sequence or a tensor of labels as (n,) int64, any negative value becoming -1, "no class".

    None stays None. An unconditional model (num_classes = 0) takes only None and negative labels, and gives None.
    """
    if labels is None:
        return None
    if isinstance(labels, Tensor):
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise ArgumentError(name, "integers", f"a {short(labels.dtype)} tensor")
        if labels.dim() > 1:
            raise ArgumentError(name, "an int or a 1-D tensor", f"shape {tuple(labels.shape)}")
        out = labels.detach().reshape(-1).long()
    else:
        values = [labels] if isinstance(labels, int) else labels
        if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
            raise ArgumentError(name, "an int, a sequence of ints, a 1-D integer tensor or None", repr(labels))
        if any(isinstance(v, bool) or not isinstance(v, int) for v in values):
            raise ArgumentError(name, "integers", repr(labels))
        if any(abs(v) >= 2**63 for v in values):
            raise ArgumentError(name, f"integers below {num_classes}", repr(labels))
        out = torch.tensor(list(values), dtype=torch.int64, device="cpu")
    if out.numel() == 0:
        raise ArgumentError(name, "at least one label", "none")
    highest = int(out.max())
    if num_classes == 0:
        if highest >= 0:
            raise ArgumentError(name, "None or negative labels for an unconditional model", highest)
        return None
    if highest >= num_classes:
        raise ArgumentError(name, f"labels below num_classes = {num_classes} (negative for no class)", highest)
    return out.clamp(min=-1)


def batch_labels(labels: Labels, batch: int, num_classes: int, device: torch.device, name: str = "y") -> Tensor | None:
    """Labels for a batch of given rows: (batch,) int64 on `device`, -1 for no class. One label serves all rows."""
    out = label_tensor(labels, num_classes, name)
    if out is None:
        return None
    if out.numel() != batch:
        if not isinstance(labels, int):
            raise ArgumentError(name, f"{batch} labels, one for each row", out.numel())
        out = out.expand(batch)
    return out.to(device)
