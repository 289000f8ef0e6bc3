"""This module has blocks for tests of solvers: an engine, its sequential result, and weights that are hard to guess."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tarflow_fast import SolverPlan
from tarflow_fast.backend import make_engines
from tarflow_fast.backend.cpu.engine import cpu_missing
from tarflow_fast.engine import BlockEngine, BlockState, Condition
from tarflow_fast.engine.backend import Request
from tarflow_fast.models.tarflow import TarFlow
from tarflow_fast.solvers import sequential

NATIVE = pytest.param(
    "cpu", torch.float32, 0.0, marks=pytest.mark.skipif(cpu_missing() is not None, reason=str(cpu_missing()))
)


def engine_of(model: TarFlow, backend: str = "torch", dtype: torch.dtype = torch.float64) -> BlockEngine:
    weights = model.block_weights(0)
    return make_engines(backend, [weights], Request(torch.device("cpu"), dtype, False))[0]


def solved(engine: BlockEngine, z: Tensor, condition: Condition = Condition()) -> BlockState:  # noqa: B008
    state = engine.begin(z, condition)
    sequential(engine, state)
    return state


def louder(model: TarFlow, factor: float) -> TarFlow:
    """Returns the same with log-scales and shifts so many times as large: a block that is harder to guess."""
    with torch.no_grad():
        for block in model.blocks:
            block.proj_out.weight.mul_(factor)
    return model


def plan_of(**changes: Tensor) -> SolverPlan:
    """Returns a plan that fits `random_model()`: 2 blocks, 16 tokens of 4 values, windows 2, 4, 8 and 15."""
    tensors = {"slope": torch.zeros(2, 16, 4), "shift": torch.zeros(2, 16, 4)}
    tensors |= {"passes": torch.ones(2, 4), "evaluations": torch.full((2, 4), torch.nan)}
    return SolverPlan(**{**tensors, **changes})
