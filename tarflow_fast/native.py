"""The compiled module of the CPU (`csrc/cpu/`), and which of its instruction sets this machine has."""

from __future__ import annotations

import os
from importlib import import_module
from types import ModuleType

import torch

from .errors import BackendError

ISA_VARIABLE = "TARFLOW_FAST_CPU_ISA"
CPU_DTYPES = (torch.float32, torch.bfloat16)


def load_native() -> ModuleType:
    """The compiled module. Raises BackendError with the mend where it was not built."""
    try:
        return import_module("tarflow_fast._cpu")
    except ImportError as error:
        raise BackendError(
            "the native CPU engine was not built; install a C++17 compiler (g++ or clang++) and install tarflow_fast "
            f"again ({error})"
        ) from error


def instruction_sets() -> list[str]:
    """Those that this machine has, best first. Raises BackendError."""
    return [name for name, usable in reversed(load_native().instruction_sets()) if usable]


def choose_instruction_set(wanted: str | None = None) -> str:
    """`wanted`, else what the environment variable TARFLOW_FAST_CPU_ISA names, else the best there is."""
    names = instruction_sets()
    wanted = wanted or os.environ.get(ISA_VARIABLE) or names[0]
    if wanted not in names:
        raise BackendError(f"{ISA_VARIABLE}: {wanted!r} cannot be had here; choose one of {', '.join(names)}")
    return wanted
