"""This module makes Triton engines for tests, on a GPU or in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import KERNEL_DEVICE

from tarflow_fast.backend.triton import plan as triton_plan
from tarflow_fast.backend.triton.engine import TritonEngine
from tarflow_fast.backend.triton.workspace import Pool
from tarflow_fast.models.tarflow import TarFlow

TUNED = TritonEngine._tuned  # see conftest.py
ON_GPU = pytest.mark.skipif(KERNEL_DEVICE.type != "cuda", reason="there is no GPU")
SHAPE = triton_plan.PassShape(
    rows=32,
    pairs=384,
    samples=16,
    window=1,
    tokens=1024,
    channels=768,
    hidden=3072,
    token_dim=192,
    out_dim=384,
    head_dim=64,
    dtype=torch.bfloat16,
    multiprocessors=132,
)


def engine_of(model: TarFlow, k: int = 0, pool: Pool | None = None, **options: Any) -> TritonEngine:
    weights = model.block_weights(k)
    return TritonEngine(weights, device=KERNEL_DEVICE, dtype=torch.float32, pool=pool, **options)
