"""The compiled module of the CPU (`csrc/cpu/`), the instruction sets of this machine, and tensors' addresses."""

from __future__ import annotations

import os
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from .errors import ArgumentError, BackendError

ISA_VARIABLE = "TARFLOW_FAST_CPU_ISA"
CPU_DTYPES = (torch.float32, torch.bfloat16)


def load_native() -> ModuleType:
    """Returns the compiled module. Raises BackendError, which says what to install, where it was not built."""
    try:
        return import_module("tarflow_fast._cpu")
    except ImportError as error:
        raise BackendError(
            "the native CPU engine was not built; install a C++17 compiler (g++ or clang++) and install tarflow_fast "
            f"again ({error})"
        ) from error


def address(
    name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device | str = "cpu", count: int | None = None
) -> int:
    """Returns the address at which a tensor's values begin, for native code.

    Native code takes `count` values of this dtype there. This is the one place where addresses are taken. The caller
    keeps the tensor alive. Raises ArgumentError if the tensor has another dtype or kind of device, or has gaps or
    another number of values: native code would read other numbers, or beyond the end.
    """
    kind = device.type if isinstance(device, torch.device) else device.partition(":")[0]
    if (
        tensor.dtype != dtype
        or tensor.device.type != kind
        or not tensor.is_contiguous()
        or (count is not None and tensor.numel() != count)
    ):
        wanted = f"a contiguous {dtype} tensor on {device}" + ("" if count is None else f" of {count} values")
        raise ArgumentError(name, wanted, f"{tensor.dtype} on {tensor.device}, {tuple(tensor.shape)}")
    return tensor.data_ptr()


def instruction_sets() -> list[str]:
    """Returns the instruction sets that this machine has, best first. Raises BackendError where nothing was built."""
    return [name for name, usable in reversed(load_native().instruction_sets()) if usable]


def choose_instruction_set(wanted: str | None = None) -> str:
    """Returns `wanted`, or else the set that the environment variable TARFLOW_FAST_CPU_ISA names, or else the best one.

    Raises BackendError where this machine does not have it.
    """
    names = instruction_sets()
    wanted = wanted or os.environ.get(ISA_VARIABLE) or names[0]
    if wanted not in names:
        raise BackendError(f"{ISA_VARIABLE}: {wanted!r} cannot be had here; choose one of {', '.join(names)}")
    return wanted
