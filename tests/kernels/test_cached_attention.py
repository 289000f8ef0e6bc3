"""The attention kernel against PyTorch: windows, splits, positions, head sizes, temperatures and dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import KERNEL_DEVICE, named
from tolerances import assert_close, error_budget, max_error
from torch import Tensor

from tarflow_fast.errors import ArgumentError
from tarflow_fast.kernels.cached_attention import Tile, cached_attention, reference
from tarflow_fast.kernels.launch import Scratch

DECODE = Tile(tokens=4)
WINDOW = Tile(window=16, tokens=16)
FP32 = 1e-5
FLOATS = ("queries", "keys", "values", "scale")


def operands(
    R: int, H: int, T: int, d: int, position: int, window: int = 1, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Tokens that may not be read are NaN; the rows' temperatures differ."""
    queries = torch.randn(R * window, H * d)
    keys, values = torch.randn(2, R, H, T, d)
    keys[:, :, position + window :] = torch.nan
    values[:, :, position + window :] = torch.nan
    scale = d**-0.5 / torch.linspace(0.5, 2, R)
    given = {"queries": queries, "keys": keys, "values": values}
    given = {name: each.to(KERNEL_DEVICE, dtype).contiguous() for name, each in given.items()}
    return {**given, "scale": scale.to(KERNEL_DEVICE)}


def run(given: dict[str, Any], position: int, window: int, tile: Tile, **options: Any) -> Tensor:
    out = torch.full_like(given["queries"], torch.nan)
    at = torch.tensor([position - 1], dtype=torch.int32, device=KERNEL_DEVICE)
    cached_attention(**given, out=out, position=at, offset=1, window=window, tile=tile, **options)
    return out


def exact(given: dict[str, Any], position: int, window: int) -> Tensor:
    return reference(*(given[name].double() for name in FLOATS), position, window)


@pytest.mark.parametrize("tile", [DECODE, Tile(tokens=16, splits=3), Tile(tokens=2, splits=8), WINDOW], ids=str)
@pytest.mark.parametrize(
    ("R", "H", "T", "d", "position"), [(1, 1, 1, 32, 0), (2, 3, 9, 64, 4), (3, 1, 40, 128, 39), (2, 2, 33, 24, 17)]
)
def test_decoding_equals_the_reference(tile: Tile, R: int, H: int, T: int, d: int, position: int) -> None:
    given = operands(R, H, T, d, position)
    assert_close(run(given, position, 1, tile), exact(given, position, 1), FP32)


@pytest.mark.parametrize("tile", [DECODE, WINDOW, Tile(16, 16, splits=3), Tile(32, 32, stages=1)], ids=str)
@pytest.mark.parametrize(("T", "position", "window"), [(5, 0, 5), (37, 11, 7), (40, 3, 37), (23, 22, 1)])
def test_windows_are_causal(tile: Tile, T: int, position: int, window: int) -> None:
    given = operands(2, 1 if window > 16 else 2, T, 32, position, window)
    assert_close(run(given, position, window, tile), exact(given, position, window), FP32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile", [DECODE, Tile(tokens=8, splits=2), WINDOW], ids=str)
@pytest.mark.parametrize("window", [1, 6])
def test_half_precision(dtype: torch.dtype, tile: Tile, window: int) -> None:
    given = operands(2, 2, 30, 64, 20, window, dtype)
    wanted = exact(given, 20, window)
    plain = reference(*(given[name] for name in FLOATS[:3]), given["scale"].to(dtype), 20, window)
    assert max_error(run(given, 20, window, tile), wanted) <= error_budget(plain, wanted, dtype)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile", [WINDOW, Tile(16, 16, splits=2)], ids=str)
def test_a_bad_token_spoils_those_from_it_on(tile: Tile, dtype: torch.dtype, bad: float) -> None:
    """Queries before the token whose value is not finite give the same bits as without it."""
    given = operands(2, 2, 40, 32, 30, 8, dtype)
    wanted = run(given, 30, 8, tile).reshape(2, 8, -1)
    given["values"][0, :, 33, 5] = bad
    found = run(given, 30, 8, tile).reshape(2, 8, -1)
    assert torch.equal(found[0, :3], wanted[0, :3])
    assert torch.equal(found[1], wanted[1])
    assert not found[0, 3:].isfinite().any()


@pytest.mark.parametrize("tile", [DECODE, Tile(tokens=4, splits=3), WINDOW], ids=str)
def test_logits_of_any_size(tile: Tile) -> None:
    """A softmax is of differences: logits beyond e^88, all negative or all positive, overflow nothing."""
    for sign in (1, -1):
        given = operands(1, 1, 20, 32, 19)
        given["keys"] = given["queries"].view(1, 1, 1, 32) * 30 * sign + given["keys"]
        wanted = exact(given, 19, 1)
        assert_close(run(given, 19, 1, tile), wanted, 1e-3)


def test_a_split_leaves_its_counters_as_it_found_them() -> None:
    given, tile = operands(2, 3, 20, 32, 15), Tile(tokens=4, splits=4)
    scratch = Scratch.allocate(*tile.scratch(2, 3, 1, 32), KERNEL_DEVICE)
    results = []
    for _ in range(2):
        scratch.partial.fill_(torch.nan)
        results.append(run(given, 15, 1, tile, scratch=scratch))
        assert not scratch.arrived.any()
    assert torch.equal(*results)
    assert_close(results[0], exact(given, 15, 1), FP32)


@pytest.mark.parametrize(("tile", "window"), [(Tile(tokens=4, splits=3), 1), (Tile(16, 16, splits=2), 20)], ids=str)
def test_every_part_of_a_split_has_a_place_of_its_own(tile: Tile, window: int) -> None:
    """On a GPU the tiles are computed at once; the interpreter, which goes from one to the next, would not notice."""
    scratch = Scratch.allocate(*tile.scratch(2, 3, window, 24), KERNEL_DEVICE)
    scratch.partial.fill_(torch.nan)
    run(operands(2, 3, 40, 24, 5, window), 5, window, tile, scratch=scratch)
    assert scratch.arrived.numel() == 6 * -(-window // tile.window)
    assert scratch.partial.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"keys": torch.zeros(2, 2, 9)}, "keys"),
        ({"keys": torch.zeros(2, 2, 9, 32, dtype=torch.float64)}, "keys"),
        ({"values": torch.zeros(2, 2, 8, 32)}, "values"),
        ({"queries": torch.zeros(3, 64)}, "queries"),
        ({"queries": torch.zeros(2, 128)[:, ::2]}, "queries"),
        ({"scale": torch.zeros(2, dtype=torch.bfloat16)}, "scale"),
        ({"out": torch.zeros(2, 64, dtype=torch.bfloat16)}, "out"),
        ({"position": torch.zeros(1, dtype=torch.int64)}, "position"),
        ({"window": 0}, "window"),
        ({"window": 10}, "window"),
        ({"precision": "half"}, "precision"),
        ({"tile": Tile(window=8)}, "tile"),
        ({"tile": Tile(splits=2), "scratch": Scratch.allocate(10, 10, KERNEL_DEVICE)}, "scratch"),
    ],
    ids=named,
)
def test_operands_that_cannot_be_are_refused(changes: dict[str, Any], name: str) -> None:
    given = {**operands(2, 2, 9, 32, 3), "out": torch.zeros(2, 64, device=KERNEL_DEVICE), "tile": DECODE}
    given["position"] = torch.zeros(1, dtype=torch.int32, device=KERNEL_DEVICE)
    changes = {key: each.to(KERNEL_DEVICE) if isinstance(each, Tensor) else each for key, each in changes.items()}
    with pytest.raises(ArgumentError, match=f"^{name}: expected"):
        cached_attention(**{**given, **changes})
