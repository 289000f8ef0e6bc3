"""The native CPU engine in bfloat16 is as good as the same expression in PyTorch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import random_latents, random_model
from cpu_engines import SHAPES, Problem, engine_of, inverse
from engines import GUIDED
from instruction_sets import every_set
from tolerances import BF16_BIAS, BF16_BITS, BF16_IMAGE, error_budget, max_error

from tarflow_fast.checkpoints import load_pretrained
from tarflow_fast.engine import Condition, Guidance
from tarflow_fast.native import ISA_VARIABLE
from tarflow_fast.sampling.sampler import Sampler


def check_bf16(problem: Problem, isa: str) -> None:
    """The error is at most that of the same expression in PyTorch's bf16, twice, and one rounding."""
    engine = engine_of(problem.model, 1, torch.bfloat16, instruction_set=isa)
    x, _ = inverse(engine, problem.z, problem.condition)
    exact, _ = problem.exact
    assert max_error(x, exact) <= error_budget(problem.in_bf16, exact, torch.bfloat16)


@every_set
@pytest.mark.parametrize("guidance", [Guidance(), GUIDED], ids=["unguided", "guided"])
@pytest.mark.parametrize("seed", range(3))
def test_bf16_is_as_good_as_pytorch(isa: str, guidance: Guidance, seed: int) -> None:
    check_bf16(Problem.of({"num_classes": 3, "layers_per_block": 2, "channels": 128}, guidance, seed), isa)


@every_set
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_bf16_shapes(isa: str, sizes: dict[str, Any]) -> None:
    check_bf16(Problem.of(sizes), isa)


@every_set
def test_bf16_rounding_has_no_bias(isa: str) -> None:
    """Weights, keys and values are rounded to nearest: cut off, they would be smaller by 0.07 % or more on average."""
    model = random_model(9, channels=128)
    z = random_latents(model, 16)
    sizes = []
    for dtype in (torch.float32, torch.bfloat16):
        engine = engine_of(model, 0, dtype, instruction_set=isa)
        state = engine.begin(z, Condition())
        state.cache.keys_values.zero_()
        engine.fixed_point(state, 1, model.config.num_patches)  # of the same tokens
        sizes.append(state.cache.keys_values.double().abs().sum())
    assert abs(sizes[1] / sizes[0] - 1) <= BF16_BIAS


@every_set
def test_bf16_on_the_shipped_model(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained weights: nearly the same images as in fp32, and of bf16 images the sampler reports the log-density that
    they have under the fp32 model."""
    monkeypatch.setenv(ISA_VARIABLE, isa)
    model, labels = load_pretrained(), torch.arange(10)
    exact, half = (Sampler(model, backend="cpu", dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    for guidance in (0.0, 1.0):
        a, b = (sampler.sample(10, labels, guidance=guidance) for sampler in (exact, half))
        assert 0 < (a.images - b.images).abs().mean((1, 2, 3)).median() <= BF16_IMAGE
    reported = half.sample(10, labels)
    assert reported.log_prob is not None
    with torch.no_grad():
        wanted = model.bits_per_dim(reported.images, labels)
    got = 7 - reported.log_prob / (28 * 28 * math.log(2))
    assert ((got - wanted).abs() <= BF16_BITS * wanted).all()
