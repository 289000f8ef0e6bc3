"""The order of weights, rows and sums on tensor cores, against tables that know nothing of the engine."""

from __future__ import annotations

import pytest
import torch
from mma_layouts import a, b, c, lanes, ldmatrix, mma, strided

from tarflow_fast.backend.cuda.pack import TILE, pack_linear

STRIDE = 40  # of a staged row, which is longer than its elements so that lanes are in different banks


def test_the_manuals_formulas_are_cutlass_strides() -> None:
    """SM80_16x8x16: A ((4, 8), (2, 2, 2)) : ((32, 1), (16, 8, 128)), B ((4, 8), (2, 2)) : ((16, 1), (8, 64)),
    C ((4, 8), (2, 2)) : ((32, 1), (16, 8)). CUTLASS has B as (n, k)."""
    assert torch.equal(lanes(a, 8), strided((4, 8, 2, 2, 2), (32, 1, 16, 8, 128), 16))
    assert torch.equal(lanes(b, 4).flip(-1), strided((4, 8, 2, 2), (16, 1, 8, 64), 8))
    assert torch.equal(lanes(c, 4), strided((4, 8, 2, 2), (32, 1, 16, 8), 16))


@pytest.mark.parametrize(("formula", "rows", "columns"), [(a, 16, 16), (b, 16, 8), (c, 16, 8)])
def test_every_element_is_one_lanes(formula: object, rows: int, columns: int) -> None:
    held = lanes(formula, rows * columns // 32).view(-1, 2).tolist()  # type: ignore[arg-type]
    assert sorted(map(tuple, held)) == [(row, column) for row in range(rows) for column in range(columns)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_packed_tile_is_the_first_operand(dtype: torch.dtype) -> None:
    """Lane by lane, eight elements in the order of its four registers: a lane reads them with one load of 16 bytes."""
    weight = torch.randn(3 * TILE, 2 * TILE).to(dtype)
    packed = pack_linear(weight, dtype).view(3, 2, 32, 8)
    row, column = lanes(a, 8).unbind(-1)
    for tile in range(3):
        for k in range(2):
            of_tile = weight[tile * TILE : (tile + 1) * TILE, k * TILE : (k + 1) * TILE]
            assert torch.equal(packed[tile, k], of_tile[row, column])


def test_packed_weights_times_staged_rows_are_the_product() -> None:
    """W Xᵀ for 16 outputs and 8 rows, with every index as csrc/cuda/linear.cuh has it.

    A lane reads the rows' elements 2t, 2t + 1 and 8 further on of row g, and output m of row n is sum m / 8 · 2 + n % 2
    of lane m % 8 · 4 + n / 2.
    """
    weight, x = torch.randn(TILE, 2 * TILE).bfloat16(), torch.randn(8, 2 * TILE).bfloat16()
    packed = pack_linear(weight, torch.bfloat16).view(2, 32, 8).float()
    staged = torch.full((8, STRIDE), torch.nan)
    staged[:, : 2 * TILE] = x.float()
    g, t = torch.arange(32) // 4, torch.arange(32) % 4
    sums = torch.zeros(32, 4)
    for k in range(2):
        at = g * STRIDE + k * TILE + 2 * t
        sums += mma(packed[k], staged.flatten()[torch.stack([at, at + 1, at + 8, at + 9], 1)])
    m, n = torch.arange(16)[:, None], torch.arange(8)[None, :]
    y = sums[m % 8 * 4 + n // 2, m // 8 * 2 + n % 2]
    torch.testing.assert_close(y, weight.float() @ x.float().T)


def test_ldmatrix_gives_the_operands_of_row_major_tiles() -> None:
    """x4 gives all of A where lane l has row l % 16 and column l / 16 · 8; x2 gives B of 8 rows of X, as Xᵀ is B."""
    weight, x = torch.randn(TILE, STRIDE), torch.randn(8, STRIDE)
    of_a = ldmatrix(weight.flatten(), [lane % 16 * STRIDE + lane // 16 * 8 for lane in range(32)])
    row, column = lanes(a, 8).unbind(-1)
    assert torch.equal(of_a, weight[row, column])
    of_b = ldmatrix(x.flatten(), [lane % 8 * STRIDE + lane // 8 * 8 for lane in range(16)])
    row, column = lanes(b, 4).unbind(-1)
    assert torch.equal(of_b, x[column, row])
    row, column = lanes(c, 4).unbind(-1)
    torch.testing.assert_close(mma(of_a, of_b), (weight[:, :TILE] @ x[:, :TILE].T)[row, column])
