"""This module has the backends that are here, makes an engine of one of them, and says what it is to compute."""

from __future__ import annotations

import pytest
import torch
from cases import KERNEL_DEVICE, cuda_kernel_missing
from torch import Tensor

from tarflow_fast import reference
from tarflow_fast.backend import make_engines
from tarflow_fast.backend.cpu.engine import cpu_missing
from tarflow_fast.engine import BlockEngine, BlockState, Condition, Guidance
from tarflow_fast.engine.backend import Request
from tarflow_fast.models.tarflow import TarFlow

GUIDED = Guidance(1.5, "ab", 0.7, True)
CPU = torch.device("cpu")
NATIVE = pytest.param("cpu", marks=pytest.mark.skipif(cpu_missing() is not None, reason=str(cpu_missing())))
NO_CUDA = cuda_kernel_missing()
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(NO_CUDA is not None, reason=str(NO_CUDA)))
BACKENDS = ["torch", NATIVE, "triton", CUDA]
RAGGED = ["torch", NATIVE, CUDA]


def engine_of(model: TarFlow, k: int = 0, backend: str = "torch", dtype: torch.dtype = torch.float32) -> BlockEngine:
    weights = model.block_weights(k)
    device = KERNEL_DEVICE if backend in ("triton", "cuda") else CPU
    return make_engines(backend, [weights], Request(device, dtype, False))[0]


def poisoned(engine: BlockEngine, z: Tensor, condition: Condition) -> BlockState:
    """Returns a state in which everything that the engine has yet to write is NaN."""
    state = engine.begin(z, condition)
    state.x[:, 1:] = torch.nan
    state.token_log_det[:, 1:] = torch.nan
    for holder in (state.cache, *getattr(state.cache, "windows", {}).values()):
        for name in ("keys_values", "x", "token_log_det", "h", "queries", "attended", "norms", "hidden", "parameters"):
            if isinstance(getattr(holder, name, None), Tensor):
                getattr(holder, name).fill_(torch.nan)
    return state


def expected(
    model: TarFlow, k: int, z: Tensor, condition: Condition, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Returns x and token log-dets by the reference, evaluated in that dtype and in the block's order."""
    weights = {name: value.to(dtype) for name, value in model.state_dict().items()}
    rule = condition.guidance
    flip = k % 2 == 1
    x, log_det = reference.block_inverse(
        weights,
        k,
        z.to(dtype).flip(1) if flip else z.to(dtype),
        condition.labels,
        guidance=rule.scale,
        guide_what=rule.what,
        attn_temp=rule.attn_temp,
        annealed_guidance=rule.annealed,
        head_dim=model.config.head_dim,
    )
    return (x.flip(1) if flip else x), log_det
