"""The `cpu` backend: a flow block's whole token loop in C++ (`csrc/cpu/`)."""

from __future__ import annotations

import torch

from ... import devices
from ...engine.backend import Backend, Maker, Request
from ...native import choose_instruction_set
from .engine import CpuEngine, cpu_missing


def _missing(request: Request) -> str | None:
    if request.device.type != "cpu":
        return f"it runs on the CPU, and this is {request.device}; use device='cpu', or backend='torch'"
    return cpu_missing(request.dtype, request.compile)


def _maker(request: Request) -> Maker:
    return lambda weights: CpuEngine(weights, dtype=request.dtype, threads=request.threads)


def _describe(device: torch.device) -> str:
    return f"native engine, {choose_instruction_set()}, {devices.default_threads()} threads; float32 and bfloat16"


BACKEND = Backend("cpu", ("cpu",), _missing, _maker, _describe, has_threads=True)
