"""The kernel between two steps against PyTorch: update, guidance, log-det, non-finite tokens, embedding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import KERNEL_DEVICE, named
from tolerances import assert_close, error_budget, max_error
from torch import Tensor

from tarflow_fast.errors import ArgumentError
from tarflow_fast.kernels import affine
from tarflow_fast.kernels.affine import Rule
from tarflow_fast.kernels.affine_step import Embedding, Tile, affine_step, embed, reference

TILES = [Tile(2, 16), Tile(1, 64), Tile(16, 32)]
FP32 = 2e-5
C, T = 40, 6


def rule_of(nvp: bool, what: str | None) -> Rule:
    g = None if what is None else torch.linspace(0.5, 2, T - 1, device=KERNEL_DEVICE)
    return Rule(nvp, g, what or "ab")


RULES = [rule_of(nvp, what) for nvp in (True, False) for what in (None, "a", "b", "ab")]


def embedding_of(D: int, rows: int | None, dtype: torch.dtype = torch.float32) -> Embedding:
    weight = torch.randn(C, D, device=KERNEL_DEVICE).to(dtype)
    bias, positions = torch.randn(C, device=KERNEL_DEVICE), torch.randn(T, C, device=KERNEL_DEVICE)
    return Embedding(weight, bias, positions, None if rows is None else torch.randn(rows, C, device=KERNEL_DEVICE))


def operands(B: int, D: int, rule: Rule, i: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Everything that is to be written is NaN."""
    width = 2 * D if rule.nvp else D
    rows = rule.branches * B
    z = torch.randn(B, T, D, device=KERNEL_DEVICE)
    return {
        "parameters": torch.randn(rows, width, device=KERNEL_DEVICE) * 0.5,
        "z": z,
        "x": torch.full_like(z, torch.nan),
        "token_log_det": torch.full((B, T), torch.nan, device=KERNEL_DEVICE),
        "nonfinite": torch.full((B,), T, dtype=torch.int32, device=KERNEL_DEVICE),
        "rule": rule,
        "embedding": embedding_of(D, rows, dtype),
        "h": torch.full((rows, C), torch.nan, device=KERNEL_DEVICE),
        "position": torch.tensor([i - 1], dtype=torch.int32, device=KERNEL_DEVICE),
        "offset": 1,
    }


def exact(given: dict[str, Any], i: int) -> tuple[Tensor, Tensor, Tensor]:
    """x of token i + 1, its log-det, and h, in float64."""
    rule, z = given["rule"], given["z"].double()
    x, log_det = affine.reference(given["parameters"].double().view(rule.branches, len(z), 1, -1), z, rule, i + 1)
    e = given["embedding"]
    parts = [None if part is None else part.double() for part in (e.weight, e.bias, e.positions, e.classes)]
    return x[:, 0], log_det[:, 0], reference(x, Embedding(*parts), i + 1, rule.branches)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.nvp}-{r.what if r.guidance is not None else None}")
@pytest.mark.parametrize(("B", "D", "i"), [(1, 4, 0), (5, 12, T - 2), (3, 17, 2)])
def test_equals_the_reference(tile: Tile, rule: Rule, B: int, D: int, i: int) -> None:
    given = operands(B, D, rule, i)
    affine_step(**given, tile=tile)
    x, log_det, h = exact(given, i)
    assert_close(given["x"][:, i + 1], x, FP32)
    assert_close(given["token_log_det"][:, i + 1], log_det, FP32)
    assert_close(given["h"], h, 1e-4)
    given["x"][:, i + 1] = given["token_log_det"][:, i + 1] = torch.nan
    assert given["x"].isnan().all()  # no other token was written
    assert given["token_log_det"].isnan().all()
    assert (given["nonfinite"] == T).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_half_precision_weights(tile: Tile, dtype: torch.dtype) -> None:
    given = operands(3, 12, RULES[3], 2, dtype)
    affine_step(**given, tile=tile)
    x, _, h = exact(given, 2)
    assert_close(given["x"][:, 3], x, FP32)
    plain = reference(x.float()[:, None], given["embedding"], 3, 2)
    assert max_error(given["h"], h) <= error_budget(plain, h, dtype)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_a_token_that_is_not_finite_is_remembered(tile: Tile) -> None:
    """The first one of each sample; others are not touched."""
    given = operands(4, 12, RULES[0], 2)
    given["parameters"][0, 3] = 1000.0
    given["parameters"][1, 12] = torch.nan
    given["parameters"][2, 23] = -torch.inf
    given["nonfinite"][2] = 1
    affine_step(**given, tile=tile)
    assert given["nonfinite"].tolist() == [3, 3, 1, T]
    assert_close(given["x"][3, 3], exact(given, 2)[0][3], FP32)
    assert given["h"][3].isfinite().all()


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("B", "start", "window"), [(1, 0, 1), (2, 1, 5), (3, 0, 6), (2, 5, 1)])
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("classes", [False, True])
def test_embedding_of_windows(tile: Tile, B: int, start: int, window: int, branches: int, classes: bool) -> None:
    x = torch.full((B, T, 9), torch.nan, device=KERNEL_DEVICE)
    x[:, start : start + window] = torch.randn(B, window, 9)
    embedding = embedding_of(9, branches * B if classes else None)
    h = torch.full((branches * B * window, C), torch.nan, device=KERNEL_DEVICE)
    position = torch.tensor([start], dtype=torch.int32, device=KERNEL_DEVICE)
    embed(x, embedding, h, position, tile=tile, branches=branches, window=window)
    assert_close(h, reference(x[:, start : start + window], embedding, start, branches), 2e-5)


def changed(given: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Names with a dot are fields of the embedding or the rule."""
    out = dict(given)
    for name, value in changes.items():
        value = value.to(KERNEL_DEVICE) if isinstance(value, Tensor) else value
        owner, _, field = name.partition(".")
        out[owner] = replace(out[owner], **{field: value}) if field else value
    return out


@pytest.mark.parametrize(
    "changes",
    [
        {"parameters": torch.zeros(6, 12)},
        {"z": torch.zeros(3, 6, 12, dtype=torch.float64)},
        {"x": torch.zeros(3, 5, 12)},
        {"token_log_det": torch.zeros(3, 6, 1)},
        {"nonfinite": torch.zeros(3, dtype=torch.int64)},
        {"h": torch.zeros(3, 40)},
        {"position": torch.zeros(2, dtype=torch.int32)},
        {"precision": "double"},
        {"rule.guidance": torch.zeros(6)},
        {"rule.what": "c"},
        {"embedding.weight": torch.zeros(40, 11)},
        {"embedding.bias": torch.zeros(39)},
        {"embedding.positions": torch.zeros(5, 40)},
        {"embedding.classes": torch.zeros(3, 40)},
    ],
    ids=named,
)
def test_operands_that_cannot_be_are_refused(changes: dict[str, Any]) -> None:
    given = {**operands(3, 12, RULES[3], 2), "tile": TILES[0]}
    with pytest.raises(ArgumentError, match=f"^{next(iter(changes))}: expected"):
        affine_step(**changed(given, changes))


def test_a_window_longer_than_the_sequence_is_refused() -> None:
    x, h = torch.zeros(1, T, 9, device=KERNEL_DEVICE), torch.zeros(7, C, device=KERNEL_DEVICE)
    position = torch.zeros(1, dtype=torch.int32, device=KERNEL_DEVICE)
    with pytest.raises(ArgumentError, match=r"^window: expected an integer from 1 to T = 6, got 7"):
        embed(x, embedding_of(9, None), h, position, tile=TILES[0], window=7)
