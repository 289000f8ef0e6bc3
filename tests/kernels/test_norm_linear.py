"""The kernel of the linear layers against PyTorch: every epilogue, tile and dtype, over odd sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import KERNEL_DEVICE, named
from tolerances import assert_close, error_budget, max_error
from torch import Tensor

from tarflow_fast.errors import ArgumentError
from tarflow_fast.kernels.launch import Scratch
from tarflow_fast.kernels.norm_linear import Tile, norm_linear, norm_qkv, reference

FEW = Tile(2, 16, 64)
TENSOR_CORES = Tile(16, 32, 32)
TILES = [
    FEW,
    Tile(1, 4, 128, warps=2),
    Tile(4, 8, 16, splits=3),
    TENSOR_CORES,
    Tile(16, 16, 64, splits=2),
    Tile(16, 64, 16, splits=5, warps=8, stages=2),
    Tile(32, 32, 128, splits=1),
]
FP32 = 2e-5


def operands(rows: int, N: int, K: int, dtype: torch.dtype, x_dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """x of mean 3, so that the norm has something to take off."""
    x = (torch.randn(rows, K) + 3).to(KERNEL_DEVICE, x_dtype)
    weight = (torch.randn(N, K) * K**-0.5).to(KERNEL_DEVICE, dtype)
    bias, gamma, beta = (torch.randn(size, device=KERNEL_DEVICE) for size in (N, K, K))
    return {"x": x, "weight": weight, "bias": bias, "norm": (gamma, beta)}


def exact(given: dict[str, Any], gelu: bool = False) -> Tensor:
    norm = None if given["norm"] is None else tuple(each.double() for each in given["norm"])
    x, weight, bias = (given[name].double() for name in ("x", "weight", "bias"))
    return reference(x, weight, bias, norm, gelu)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("rows", "N", "K"), [(1, 64, 64), (3, 40, 96), (17, 7, 50)])
@pytest.mark.parametrize("normed", [False, True])
def test_equals_the_reference(tile: Tile, rows: int, N: int, K: int, normed: bool) -> None:
    given = operands(rows, N, K, torch.float32)
    given["norm"] = given["norm"] if normed else None
    out = torch.full((rows, N), torch.nan, device=KERNEL_DEVICE)
    norm_linear(**given, out=out, tile=tile)
    assert_close(out, exact(given), FP32)


@pytest.mark.parametrize("tile", [FEW, TENSOR_CORES, Tile(16, 16, 32, splits=2)], ids=str)
@pytest.mark.parametrize("epilogue", ["none", "gelu", "add"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normed", [False, True])
def test_epilogues_and_dtypes(tile: Tile, epilogue: str, dtype: torch.dtype, normed: bool) -> None:
    """Without a norm the operand has the dtype of the weights, as what attention and GELU leave."""
    given = operands(5, 48, 64, dtype, torch.float32 if normed else dtype)
    given["norm"] = given["norm"] if normed else None
    before = torch.randn(5, 48, device=KERNEL_DEVICE)
    out = before.clone() if epilogue == "add" else torch.full_like(before, torch.nan, dtype=dtype)
    norm_linear(**given, out=out, tile=tile, epilogue=epilogue)
    wanted, plain = exact(given, epilogue == "gelu"), reference(**given, gelu=epilogue == "gelu")
    if epilogue == "add":
        wanted, plain = wanted + before, plain + before
    if dtype == torch.float32:
        assert_close(out, wanted, FP32)
    else:
        assert max_error(out, wanted) <= error_budget(plain, wanted, dtype)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("tile", [FEW, TENSOR_CORES, Tile(16, 16, 32, splits=2)], ids=str)
@pytest.mark.parametrize(("H", "d", "window", "start"), [(2, 32, 1, 3), (3, 16, 4, 0), (1, 64, 2, 5)])
def test_keys_and_values_go_into_the_cache(
    tile: Tile, H: int, d: int, window: int, start: int, dtype: torch.dtype
) -> None:
    R, T, C = 3, 7, H * d
    given = operands(R * window, 3 * C, C, dtype)
    cache = torch.full((2, R, H, T, d), torch.nan, device=KERNEL_DEVICE, dtype=dtype)
    queries = torch.full((R * window, C), torch.nan, device=KERNEL_DEVICE, dtype=dtype)
    position = torch.tensor([start - 2], dtype=torch.int32, device=KERNEL_DEVICE)
    norm_qkv(**given, queries=queries, keys=cache[0], values=cache[1], position=position, offset=2, window=window,
             tile=tile)  # fmt: skip
    there = slice(start, start + window)
    got = torch.stack([queries.view(R, window, H, d), *cache[:, :, :, there].transpose(2, 3)])
    wanted, plain = (y.view(R, window, 3, H, d).permute(2, 0, 1, 3, 4) for y in (exact(given), reference(**given)))
    if dtype == torch.float32:
        assert_close(got, wanted, FP32)
    else:
        assert max_error(got, wanted) <= error_budget(plain, wanted, dtype)
    cache[:, :, :, there] = torch.nan
    assert cache.isnan().all()  # nothing else was written


def test_statistics_of_rows_far_from_zero() -> None:
    """Variance of values around 1,000 with a spread of 1: E[x²] − E[x]² in fp32 would lose it."""
    given = operands(3, 16, 100, torch.float32)
    given["x"] += 1000
    out = torch.full((3, 16), torch.nan, device=KERNEL_DEVICE)
    norm_linear(**given, out=out, tile=FEW)
    assert_close(out, exact(given), 1e-3)


def test_a_split_leaves_its_counters_as_it_found_them() -> None:
    given = operands(5, 48, 64, torch.float32)
    tile = Tile(16, 16, 16, splits=4)
    scratch = Scratch.allocate(*tile.scratch(5, 48), KERNEL_DEVICE)
    results = []
    for _ in range(2):
        scratch.partial.fill_(torch.nan)
        out = torch.full((5, 48), torch.nan, device=KERNEL_DEVICE)
        norm_linear(**given, out=out, tile=tile, scratch=scratch)
        assert not scratch.arrived.any()
        results.append(out)
    assert_close(results[0], exact(given), FP32)
    assert torch.equal(*results)


def test_every_part_of_a_split_has_a_place_of_its_own() -> None:
    """On a GPU the tiles are computed at once; the interpreter, which goes from one to the next, would not notice."""
    given = operands(33, 48, 64, torch.float32)
    tile = Tile(16, 16, 32, splits=2)
    scratch = Scratch.allocate(*tile.scratch(33, 48), KERNEL_DEVICE)
    scratch.partial.fill_(torch.nan)
    norm_linear(**given, out=torch.empty(33, 48, device=KERNEL_DEVICE), tile=tile, scratch=scratch)
    assert scratch.arrived.numel() == 9
    assert scratch.partial.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"x": torch.zeros(5, 63)}, "x"),
        ({"x": torch.zeros(5, 64, dtype=torch.float64)}, "x"),
        ({"x": torch.zeros(5, 128)[:, ::2]}, "x"),
        ({"x": torch.zeros(5, 64, dtype=torch.bfloat16)}, "x"),
        ({"weight": torch.zeros(48, 64, dtype=torch.float64)}, "weight"),
        ({"weight": [1.0]}, "weight"),
        ({"bias": torch.zeros(47)}, "bias"),
        ({"norm": (torch.ones(64), torch.ones(63))}, r"norm\[1\]"),
        ({"out": torch.zeros(4, 48)}, "out"),
        ({"epilogue": "relu"}, "epilogue"),
        ({"precision": "bf16"}, "precision"),
        ({"tile": Tile(16, 16, 16, splits=4), "scratch": Scratch.allocate(10, 10, KERNEL_DEVICE)}, "scratch"),
    ],
    ids=named,
)
def test_operands_that_cannot_be_are_refused(changes: dict[str, Any], name: str) -> None:
    given = {**operands(5, 48, 64, torch.float32), "out": torch.zeros(5, 48, device=KERNEL_DEVICE), "tile": FEW}
    changes = {key: each.to(KERNEL_DEVICE) if isinstance(each, Tensor) else each for key, each in changes.items()}
    with pytest.raises(ArgumentError, match=f"^{name}: expected"):
        norm_linear(**{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"weight": torch.zeros(96, 48)}, "weight"),
        ({"queries": torch.zeros(6, 32, dtype=torch.bfloat16)}, "queries"),
        ({"values": torch.zeros(3, 2, 5, 16)}, "values"),
        ({"position": torch.zeros(1)}, "position"),
        ({"window": 1}, "x"),
    ],
    ids=named,
)
def test_cache_that_cannot_be_is_refused(changes: dict[str, Any], name: str) -> None:
    given = {**operands(6, 96, 32, torch.float32), "window": 2, "tile": FEW, "queries": torch.zeros(6, 32),
             "keys": torch.zeros(3, 2, 4, 16), "values": torch.zeros(3, 2, 4, 16),
             "position": torch.zeros(1, dtype=torch.int32)}  # fmt: skip
    given = {key: each.to(KERNEL_DEVICE) if isinstance(each, Tensor) else each for key, each in given.items()}
    changes = {key: each.to(KERNEL_DEVICE) if isinstance(each, Tensor) else each for key, each in changes.items()}
    with pytest.raises(ArgumentError, match=f"^{name}: expected"):
        norm_qkv(**{**given, **changes})
