"""Checks of arguments, shared by every public entry point. Each raises ArgumentError before any work is done."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import host_ops
from .errors import ArgumentError, TarFlowWarning
from .scalars import plain

Label = int | str | np.integer | np.ndarray | Tensor  # arrays and tensors without dimensions
Labels = Label | Sequence[Label] | None
Number = float | np.number | np.ndarray | Tensor
Count = int | np.integer | np.ndarray | Tensor
Flag = bool | int | np.bool_
"""The types taken for labels, numbers and flags: Python's, numpy's and torch's, and strings that name classes."""

WEIGHTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # the dtypes that weights may have
GUIDE_WHAT = ("a", "b", "ab")


def short(dtype: torch.dtype) -> str:
    """Returns a dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")


def kind_of(value: object) -> str:
    """Returns the name of a value's type for a message; "None" for None, and a class's own name for a class."""
    if value is None:
        return "None"
    return value.__name__ if isinstance(value, type) else type(value).__name__


def check_dense(name: str, x: Tensor, *, values: bool = True) -> None:
    """Raises ArgumentError for a tensor that is not an array in memory. values: whether it has to have values."""
    kinds = {"nested": x.is_nested, "quantized": x.is_quantized, "meta": values and x.is_meta}
    kind = next((kind for kind, found in kinds.items() if found), None)
    if kind is None and x.layout is not torch.strided:
        kind = str(x.layout).removeprefix("torch.")
    if kind is not None:
        raise ArgumentError(name, "a dense tensor with values", f"a {kind} tensor")


def check_weights(module: nn.Module) -> None:
    """Raises ArgumentError, with what would mend it, where a module's weights are not plain floats that have values."""
    for name, part in module.named_modules():
        where = type(part).__name__ + (f" at {name}" if name else "")
        hooks = {type(hook).__module__.partition("torch.nn.utils.")[2] for hook in part._forward_pre_hooks.values()}
        if parametrize.is_parametrized(part) or hooks & {"weight_norm", "spectral_norm", "prune"}:
            mend = "remove_parametrizations, remove_weight_norm, remove_spectral_norm or prune.remove"
            raise ArgumentError("model", f"plain weights; make them so by torch.nn.utils' {mend}", f"the {where}")
        if type(part).__module__.startswith(("torch.ao.nn.", "torch.nn.quantized", "torchao.", "bitsandbytes.")):
            raise ArgumentError("model", "the model before it was quantized", f"the {where}")
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if nn.parameter.is_lazy(value):
            raise ArgumentError("model", "initialised weights; call the module once", f"an uninitialised {name}")
        if value.is_meta:
            raise ArgumentError(
                "model", "weights with values; load_state_dict(…, assign=True) gives some", f"{name} on 'meta'"
            )
    for name, value in module.named_parameters():
        if value.dtype not in WEIGHTS or value.layout is not torch.strided:
            known = ", ".join(map(short, WEIGHTS))
            got = f"{name} of {short(value.dtype)}, {str(value.layout).removeprefix('torch.')}"
            raise ArgumentError("model", f"dense weights of {known}", got)


def check_floats(name: str, x: object, shape: tuple[int, ...]) -> Tensor:
    """Returns x if it is a dense floating-point tensor of this shape. Raises ArgumentError otherwise."""
    if not isinstance(x, Tensor):
        raise ArgumentError(name, f"a floating-point tensor {shape}", kind_of(x))
    check_dense(name, x)
    if not x.is_floating_point() or tuple(x.shape) != shape:
        raise ArgumentError(name, f"a floating-point tensor {shape}", f"a {short(x.dtype)} tensor {tuple(x.shape)}")
    return x


def check_tensor(name: str, x: object, shape: tuple[int, ...], *, finite: bool = True) -> Tensor:
    """Returns x if it is a floating-point tensor of shape (B >= 1, *shape), of finite values unless finite=False.

    Raises ArgumentError otherwise. To look at the values is to wait for the device, so the training path asks only for
    the shape.
    """
    wanted = "(B, " + ", ".join(map(str, shape)) + ")"
    if not isinstance(x, Tensor):
        raise ArgumentError(name, f"a tensor {wanted}", type(x).__name__)
    check_dense(name, x, values=finite)
    if not x.is_floating_point():
        raise ArgumentError(name, "a floating-point tensor", short(x.dtype))
    if x.dim() != len(shape) + 1 or tuple(x.shape[1:]) != shape or x.shape[0] == 0:
        raise ArgumentError(name, f"shape {wanted} with B >= 1", tuple(x.shape))
    if finite and not host_ops.all_finite(x.detach()):
        raise ArgumentError(name, "finite values", "a tensor with infinities or NaNs")
    return x


def warn_range(name: str, x: Tensor, most: float, meant: str) -> None:
    """Warn of finite values beyond ±most, which nobody who means `meant` gives."""
    largest = float(x.detach().abs().max())
    if largest > most:
        warnings.warn(f"{name}: values of up to {largest:.3g}, where {meant} is meant", TarFlowWarning, stacklevel=4)


def check_number(
    name: str, value: object, low: float = -math.inf, high: float = math.inf, *, open_low: bool = False
) -> float:
    """Returns a finite real number in [low, high], or in (low, high] when open_low. Raises ArgumentError otherwise."""
    bound = f"a finite number {'>' if open_low else '>='} {low:g}" + ("" if math.isinf(high) else f" and <= {high:g}")
    if math.isinf(low):
        bound = "a finite number"
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
        raise ArgumentError(name, bound, repr(value))
    if number < low or number > high or (open_low and number == low):
        raise ArgumentError(name, bound, repr(value))
    return float(number)


def check_count(name: str, value: object, low: int = 1, high: int | None = None) -> int:
    """Returns an integer in [low, high]. Raises ArgumentError for anything else, a bool too."""
    count = plain(value)
    if isinstance(count, bool) or not isinstance(count, int) or count < low or (high is not None and count > high):
        bound = f"an integer >= {low}" + ("" if high is None else f" and <= {high}")
        raise ArgumentError(name, bound, repr(value))
    return count


def check_choice(name: str, value: object, choices: Sequence[str]) -> str:
    """Returns one of the choices. Raises ArgumentError for anything else."""
    if not isinstance(value, str) or value not in choices:
        raise ArgumentError(name, "one of " + ", ".join(map(repr, choices)), repr(value))
    return value


def label_tensor(
    labels: Labels, num_classes: int, name: str = "labels", class_names: Sequence[str] | None = None
) -> Tensor | None:
    """Returns labels as (n,) int64, every negative value becoming -1, "no class".

    labels: one label, or a sequence, an array or a tensor of them. None stays None. An unconditional model (num_classes
    = 0) takes only None and negative labels, for which None is returned. class_names: the names that the model knows
    its classes by, which labels may be too. Raises ArgumentError for other labels.
    """
    if labels is None:
        return None
    if isinstance(labels, np.ndarray):
        labels = _from_array(name, labels)
    if isinstance(labels, Tensor):
        check_dense(name, labels)
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise ArgumentError(name, "integers", f"a {short(labels.dtype)} tensor")
        if labels.dim() > 1:
            raise ArgumentError(name, "an int or a 1-D tensor", f"shape {tuple(labels.shape)}")
        out = labels.detach().reshape(-1).long()
    else:
        given = [labels] if isinstance(labels, (int, str, np.generic)) else labels
        if isinstance(given, bytes) or not isinstance(given, Sequence):
            expected = "an int, a class's name, a sequence of these, a 1-D integer tensor or array, or None"
            raise ArgumentError(name, expected, repr(labels))
        values = [_label_named(name, v, class_names) if isinstance(v, str) else plain(v) for v in given]
        if any(isinstance(v, bool) or not isinstance(v, int) for v in values):
            raise ArgumentError(name, "integers", repr(labels))
        if any(abs(v) >= 2**63 for v in values):
            raise ArgumentError(name, f"integers below {num_classes}", repr(labels))
        out = torch.tensor(values, dtype=torch.int64, device="cpu")
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


def _from_array(name: str, labels: np.ndarray) -> Any:
    """Returns the list, or the single label, in an array of integers or names. Raises ArgumentError."""
    if labels.dtype.kind not in "iuUO" or labels.ndim > 1:
        expected = "a 1-D array of integers or class names"
        raise ArgumentError(name, expected, f"a {labels.dtype} array of shape {labels.shape}")
    return labels.tolist()


def find_class(name: str, names: Sequence[str], argument: str = "labels") -> int | None:
    """Returns the number of the class of that name, or None if there is none.

    A name that is spelt exactly so comes before one in another case. Raises ArgumentError where several classes are
    called that.
    """
    for spelt in (str, str.casefold):
        found = [i for i, known in enumerate(names) if spelt(known) == spelt(name)]
        if len(found) > 1:
            some = ", ".join(map(str, found[:5])) + (", …" if len(found) > 5 else "")
            raise ArgumentError(argument, "the name of one class, or its number", f"{name!r}, as are {some}")
        if found:
            return found[0]
    return None


def _label_named(argument: str, label: str, class_names: Sequence[str] | None) -> int:
    """Returns the number of the class that a label names. Raises ArgumentError where the model has no such name."""
    if not class_names:
        raise ArgumentError(argument, "integers, as this model records no names of classes", repr(label))
    found = find_class(label, class_names, argument)
    if found is None:
        some = ", ".join(map(repr, class_names[:20])) + (", …" if len(class_names) > 20 else "")
        raise ArgumentError(argument, f"one of {some}", repr(label))
    return found


def batch_labels(
    labels: Labels,
    batch: int,
    num_classes: int,
    device: torch.device,
    name: str = "y",
    class_names: Sequence[str] | None = None,
) -> Tensor | None:
    """Returns labels for a batch of given rows, (batch,) int64 on `device`, -1 for no class.

    One label serves all rows. None is returned as in `label_tensor`. Raises ArgumentError for another number of labels.
    """
    out = label_tensor(labels, num_classes, name, class_names)
    if out is None:
        return None
    if out.numel() != batch:
        if (isinstance(labels, Sequence) and not isinstance(labels, str)) or getattr(labels, "ndim", 0) > 0:
            raise ArgumentError(name, f"{batch} labels, one for each row", out.numel())
        out = out.expand(batch)
    return out.to(device)
