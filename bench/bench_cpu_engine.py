"""Micro-benchmarks of the native CPU engine: one flow block's sequential pass, for every instruction set.

`python -m pytest bench/bench_cpu_engine.py --benchmark-only`, with `--benchmark-autosave` and `--benchmark-compare` to
set a change against what was before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tarflow_fast.backend.cpu.engine import CpuEngine
from tarflow_fast.engine import Condition
from tarflow_fast.native import instruction_sets

from .common.models import MODELS, random_model


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 16, 64])
def test_small_block(benchmark: Callable[..., Any], isa: str, dtype: torch.dtype, batch: int) -> None:
    config = MODELS["small"]
    weights = random_model(config, 0).block_weights(0)
    engine = CpuEngine(weights, dtype=dtype, instruction_set=isa)
    z = torch.randn(batch, config.num_patches, config.token_dim, generator=torch.Generator().manual_seed(0))
    state = engine.begin(z, Condition())
    benchmark(engine.reverse, state)
    assert state.x.isfinite().all()
