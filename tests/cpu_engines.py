"""This module makes CPU engines for tests; importing it skips the tests where the native module was not built."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch
from cases import random_latents, random_model
from engines import expected, poisoned
from torch import Tensor

from tarflow_fast.backend.cpu.engine import CpuEngine, cpu_missing
from tarflow_fast.engine import Condition, Guidance
from tarflow_fast.models.tarflow import TarFlow

if cpu_missing() is not None:
    pytest.skip(str(cpu_missing()), allow_module_level=True)


UNGUIDED = Guidance()


def engine_of(model: TarFlow, k: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> CpuEngine:
    return CpuEngine(model.block_weights(k), dtype=dtype, **options)


def inverse(engine: CpuEngine, z: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
    state = poisoned(engine, z, condition)
    engine.reverse(state)
    return state.x, state.token_log_det


SHAPES = [
    {"channels": 128, "layers_per_block": 2, "num_classes": 3},  # two heads of 64
    {"channels": 96, "head_dim": 32, "in_channels": 3, "img_size": 6},
    {"channels": 128, "head_dim": 128, "img_size": 14, "patch_size": 2},  # one head; T = 49: several blocks of keys
    {"channels": 35, "head_dim": 7, "img_size": 10, "patch_size": 5, "layers_per_block": 2},  # nothing is even
    {"channels": 48, "head_dim": 16, "img_size": 6, "patch_size": 3, "num_classes": 2, "nvp": False},
    {"channels": 64, "img_size": 26, "patch_size": 2},  # T = 169: more than one chunk of keys
]


@dataclass(frozen=True)
class Problem:
    """A problem is latents for block 1 of a model, and what the reference makes of them in float64."""

    model: TarFlow
    z: Tensor
    condition: Condition

    @classmethod
    def of(cls, sizes: dict[str, Any], guidance: Guidance = UNGUIDED, seed: int = 3) -> Problem:
        return _problem(tuple(sizes.items()), guidance, seed)

    @cached_property
    def exact(self) -> tuple[Tensor, Tensor]:
        return expected(self.model, 1, self.z, self.condition)

    @cached_property
    def in_bf16(self) -> Tensor:
        """Returns the result of the same expression in PyTorch, in bf16."""
        return expected(self.model, 1, self.z, self.condition, torch.bfloat16)[0]


@functools.lru_cache(maxsize=2)  # instruction sets come one after the other
def _problem(sizes: tuple[tuple[str, Any], ...], guidance: Guidance, seed: int) -> Problem:
    model = random_model(seed, **dict(sizes))
    labels = torch.tensor([0, -1, 1]) if model.config.num_classes else None
    return Problem(model, random_latents(model, 3), Condition(labels, guidance))
