"""The `torch` backend: PyTorch's own kernels on any device."""

from __future__ import annotations

import torch

from ...engine.backend import Backend, Maker, Request
from .engine import TorchEngine


def _maker(request: Request) -> Maker:
    return lambda weights: TorchEngine(weights, device=request.device, dtype=request.dtype, compile=request.compile)


def _describe(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"PyTorch {torch.__version__} on {name}"


BACKEND = Backend("torch", ("cuda", "mps", "cpu"), lambda request: None, _maker, _describe)
