"""This module makes CUDA engines for tests, on a GPU or in the emulation; without either, importing it skips the
tests."""

from __future__ import annotations

import pytest
import torch
from cases import KERNEL_DEVICE, cuda_kernel_missing
from engines import poisoned
from torch import Tensor

from tarflow_fast.backend.cuda.engine import CudaEngine
from tarflow_fast.engine import Condition
from tarflow_fast.models.tarflow import TarFlow

EMULATED = KERNEL_DEVICE.type == "cpu"
IN_EMULATION = pytest.mark.skipif(not EMULATED, reason="of the emulation")
HALVES = [torch.bfloat16, torch.float16]


if cuda_kernel_missing() is not None:
    pytest.skip(str(cuda_kernel_missing()), allow_module_level=True)


def engine_of(model: TarFlow, k: int = 0, dtype: torch.dtype = torch.float32) -> CudaEngine:
    return CudaEngine(model.block_weights(k), device=KERNEL_DEVICE, dtype=dtype)


def inverse(engine: CudaEngine, z: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
    state = poisoned(engine, z, condition)
    engine.reverse(state)
    return state.x.cpu(), state.token_log_det.cpu()
