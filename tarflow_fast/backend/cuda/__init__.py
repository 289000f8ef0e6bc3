"""The `cuda` backend: all steps of a flow block's pass in one launch of one kernel (`csrc/cuda/`)."""

from __future__ import annotations

import torch

from ...engine.backend import Backend, Maker, Request
from ...engine.shape import BlockShape
from .engine import CudaEngine, cuda_missing, head_dim_missing, native_missing


def _missing(request: Request) -> str | None:
    return cuda_missing(request.device, request.dtype, request.compile)


def _unsupported(shape: BlockShape, dtype: torch.dtype) -> str | None:
    return head_dim_missing(shape.head_dim, dtype)


def _maker(request: Request) -> Maker:
    return lambda weights: CudaEngine(weights, device=request.device, dtype=request.dtype)


def _describe(device: torch.device) -> str:
    return f"one kernel a block on {torch.cuda.get_device_name(device)}"


BACKEND = Backend(
    "cuda",
    ("cuda",),
    _missing,
    _maker,
    _describe,
    unsupported=_unsupported,
    not_installed=native_missing,
    probed=True,
)
