"""The kernel of a parallel pass's update against PyTorch, and what it says each token moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import KERNEL_DEVICE, named
from tolerances import assert_close
from torch import Tensor

from tarflow_fast.errors import ArgumentError
from tarflow_fast.kernels.affine import Rule, reference
from tarflow_fast.kernels.fixed_point_update import Tile, fixed_point_update

T = 7
FP32 = 2e-5
RULES = [
    Rule(nvp, None if what is None else torch.linspace(0.5, 2, T - 1, device=KERNEL_DEVICE), what or "ab")
    for nvp in (True, False)
    for what in (None, "a", "b", "ab")
]


def operands(B: int, D: int, rule: Rule, start: int, window: int) -> dict[str, Any]:
    z, x = torch.randn(2, B, T, D, device=KERNEL_DEVICE)
    rows = rule.branches * B * window
    return {
        "parameters": torch.randn(rows, 2 * D if rule.nvp else D, device=KERNEL_DEVICE) * 0.5,
        "z": z,
        "x": x.clone(),
        "token_log_det": torch.full((B, T), torch.nan, device=KERNEL_DEVICE),
        "change": torch.full((B, window), torch.nan, device=KERNEL_DEVICE),
        "residual": torch.full((B, window), torch.nan, device=KERNEL_DEVICE),
        "rule": rule,
        "position": torch.tensor([start - 1], dtype=torch.int32, device=KERNEL_DEVICE),
    }


@pytest.mark.parametrize("tile", [Tile(1), Tile(4), Tile(32)], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.nvp}-{r.what if r.guidance is not None else None}")
@pytest.mark.parametrize(("B", "D", "start", "window"), [(1, 4, 1, 6), (3, 17, 4, 2), (5, 12, 6, 1)])
def test_equals_the_reference(tile: Tile, rule: Rule, B: int, D: int, start: int, window: int) -> None:
    given = operands(B, D, rule, start, window)
    before = given["x"].clone()
    fixed_point_update(**given, tile=tile)
    parameters = given["parameters"].double().view(rule.branches, B, window, -1)
    x, log_det = reference(parameters, given["z"].double(), rule, start)
    there = slice(start, start + window)
    assert_close(given["x"][:, there], x, FP32)
    assert_close(given["token_log_det"][:, there], log_det, FP32)
    assert_close(given["change"], (x - before[:, there]).abs().amax(-1), FP32)
    z = given["z"][:, there].double()
    shift = reference(parameters, torch.zeros_like(given["z"]).double(), rule, start)[0]
    shrink = z / (x - shift) if rule.nvp else torch.ones_like(z)  # exp(−xa), as x − xb = z · exp(xa)
    assert_close(given["residual"], ((x - before[:, there]).abs() * shrink).amax(-1), 1e-4)
    given["x"][:, there] = before[:, there]
    given["token_log_det"][:, there] = torch.nan
    assert torch.equal(given["x"], before)  # no other token was written
    assert given["token_log_det"].isnan().all()


def test_what_is_not_finite_has_moved_beyond_all_bounds() -> None:
    given = operands(2, 12, RULES[0], 2, 3)
    parameters = given["parameters"].view(2, 3, 24)
    parameters[0, 1, 5] = 1000.0
    parameters[1, 0, 13] = torch.nan
    fixed_point_update(**given, tile=Tile(4))
    for name in ("change", "residual"):
        assert given[name].isfinite().tolist() == [[True, False, True], [False, True, True]]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"parameters": torch.zeros(6, 12)}, "parameters"),
        ({"change": torch.zeros(2, 7)}, "window"),
        ({"change": torch.zeros(3, 3)}, "change"),
        ({"change": torch.zeros(2, 3, dtype=torch.float64)}, "change"),
        ({"residual": torch.zeros(2, 2)}, "residual"),
        ({"x": torch.zeros(2, 7, 11)}, "x"),
        ({"position": torch.zeros(1)}, "position"),
    ],
    ids=named,
)
def test_operands_that_cannot_be_are_refused(changes: dict[str, Any], name: str) -> None:
    given = {**operands(2, 12, RULES[0], 2, 3), "tile": Tile(4)}
    changes = {key: each.to(KERNEL_DEVICE) if isinstance(each, Tensor) else each for key, each in changes.items()}
    with pytest.raises(ArgumentError, match=f"^{name}: expected"):
        fixed_point_update(**{**given, **changes})
