"""The engines' contract: every backend's passes against the reference, token by token, and the laws that they obey."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import KERNEL_DEVICE, random_latents, random_model
from engine_laws import (
    check_autocast,
    check_bytes,
    check_causality,
    check_progress,
    check_residual,
    check_reuse,
    check_reverse,
)
from engines import BACKENDS, CUDA, GUIDED, NATIVE, engine_of, expected, poisoned
from tolerances import INVERSE_F64, assert_close, error_budget, max_error

from tarflow_fast import reference
from tarflow_fast.engine import Condition, Guidance
from tarflow_fast.errors import ArgumentError

RULES = [Guidance(), GUIDED, Guidance(2.0, "a"), Guidance(0.5, "b", 1.3)]


def with_rules(backend: str, marks: Any = ()) -> list[Any]:
    """Triton's interpreter takes seconds for each; what is guided is the update kernel's, which has its own tests."""
    long = RULES[2:] if backend == "triton" and KERNEL_DEVICE.type == "cpu" else []
    return [
        pytest.param(
            backend, rule, marks=[*marks, *([pytest.mark.slow] if rule in long else [])], id=f"{rule}-{backend}"
        )
        for rule in RULES
    ]


@pytest.mark.parametrize(
    ("backend", "guidance"),
    [
        *with_rules("torch"),
        *with_rules("cpu", NATIVE.marks),
        *with_rules("triton"),
        *with_rules("cuda", CUDA.marks),
    ],
)
@pytest.mark.parametrize(
    ("batch", "k", "sizes"),
    [
        (1, 0, {"img_size": 6}),
        pytest.param(
            3, 1, {"num_classes": 4, "channels": 128, "layers_per_block": 2, "img_size": 6}, marks=pytest.mark.slow
        ),
        (5, 1, {"in_channels": 3, "img_size": 6, "patch_size": 2, "head_dim": 32}),
        (2, 0, {"img_size": 15, "patch_size": 5, "num_classes": 2, "head_dim": 16, "channels": 48}),
        (2, 0, {"num_classes": 2, "nvp": False}),
        (4, 0, {"img_size": 4, "patch_size": 4}),
    ],
    ids=str,
)
def test_reverse_equals_the_reference(
    backend: str, guidance: Guidance, batch: int, k: int, sizes: dict[str, int]
) -> None:
    check_reverse(backend, guidance, batch, k, sizes)


@pytest.mark.parametrize("backend", ["torch"])
@pytest.mark.parametrize("guidance", [Guidance(), GUIDED], ids=["unguided", "guided"])
def test_float64_inverts_exactly(backend: str, guidance: Guidance) -> None:
    model = random_model(5, torch.float64, num_classes=3)
    condition = Condition(torch.tensor([0, -1, 2]), guidance)
    z = random_latents(model, 3)
    engine = engine_of(model, 1, backend, torch.float64)
    state = poisoned(engine, z, condition)
    engine.reverse(state)
    assert_close(state.x, expected(model, 1, z, condition)[0], INVERSE_F64)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("torch", torch.bfloat16),
        ("torch", torch.float16),
        pytest.param("cpu", torch.bfloat16, marks=NATIVE.marks),
        ("triton", torch.bfloat16),
        ("triton", torch.float16),
        pytest.param("cuda", torch.bfloat16, marks=CUDA.marks),
        pytest.param("cuda", torch.float16, marks=CUDA.marks),
    ],
)
@pytest.mark.parametrize("guidance", [Guidance(), GUIDED], ids=["unguided", "guided"])
def test_half_precision_is_as_good_as_the_same_dtype_in_pytorch(
    backend: str, dtype: torch.dtype, guidance: Guidance
) -> None:
    """Engine against the reference evaluated in the half dtype, both against the exact result."""
    model = random_model(7, num_classes=3, layers_per_block=2, img_size=6)
    condition = Condition(torch.tensor([0, 1, -1]), guidance)
    z = random_latents(model, 3)
    engine = engine_of(model, 0, backend, dtype)
    state = poisoned(engine, z, condition)
    engine.reverse(state)
    exact, _ = expected(model, 0, z, condition)
    weights = {name: value.to(dtype) for name, value in model.state_dict().items()}
    plain, _ = reference.block_inverse(
        weights,
        0,
        z.to(dtype),
        condition.labels,
        guidance=guidance.scale,
        attn_temp=guidance.attn_temp,
        annealed_guidance=guidance.annealed,
    )
    assert max_error(state.x, exact) <= error_budget(plain, exact, dtype)


# Laws of every pass


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("guidance", [Guidance(), GUIDED], ids=["unguided", "guided"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e38])
def test_a_token_depends_on_the_tokens_before_it_alone(backend: str, guidance: Guidance, bad: float) -> None:
    check_causality(backend, guidance, bad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("nvp", [True, False])
def test_the_residual_is_that_of_the_tokens_before_the_pass(backend: str, nvp: bool) -> None:
    check_residual(backend, nvp)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_around_an_engine_changes_nothing(backend: str) -> None:
    check_autocast(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_spent_cache_is_taken_over_if_it_fits(backend: str) -> None:
    check_reuse(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_progress_counts_every_step(backend: str) -> None:
    check_progress(backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("guided", [False, True])
def test_bytes_per_sample_covers_the_cache(backend: str, guided: bool) -> None:
    check_bytes(backend, guided)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"scale": -1.0}, "guidance"),
        ({"scale": float("nan")}, "guidance"),
        ({"scale": "2"}, "guidance"),
        ({"what": "c"}, "guide_what"),
        ({"what": ""}, "guide_what"),
        ({"attn_temp": 0.0}, "attn_temp"),
        ({"attn_temp": -1}, "attn_temp"),
        ({"annealed": 2}, "annealed_guidance"),
    ],
)
def test_guidance_that_cannot_be_is_refused(arguments: dict[str, object], name: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{name}: expected"):
        Guidance(**arguments)  # type: ignore[arg-type]
