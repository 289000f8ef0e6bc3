"""Which element of a matrix each lane of a warp holds, as the PTX ISA manual's formulas for mma.m16n8k16 have it.

`lanes(formula, values)` is the table of one operand: at [lane, i] the (row, column) of the lane's element i. These
formulas are those of "Matrix Fragments for mma.m16n8k16 with floating point type" and of "ldmatrix". The same tables
follow from the strides of CUTLASS's MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN>, which are a second source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Formula = Callable[[int, int], tuple[int, int]]


def a(lane: int, i: int) -> tuple[int, int]:
    """A is 16 × 16, with 8 elements a lane."""
    group, thread = lane >> 2, lane % 4
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    return row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)


def b(lane: int, i: int) -> tuple[int, int]:
    """B is 16 × 8, with 4 elements a lane."""
    group, thread = lane >> 2, lane % 4
    return thread * 2 + (i & 1) + (8 if i >= 2 else 0), group


def c(lane: int, i: int) -> tuple[int, int]:
    """C and D are 16 × 8, with 4 elements a lane."""
    group, thread = lane >> 2, lane % 4
    return group + (8 if i >= 2 else 0), thread * 2 + (i & 1)


def lanes(formula: Formula, values: int) -> Tensor:
    """(32, values, 2) row and column of each lane's elements."""
    return torch.tensor([[formula(lane, i) for i in range(values)] for lane in range(32)])


def strided(shape: Sequence[int], strides: Sequence[int], rows: int) -> Tensor:
    """The same from CUTLASS's layout: lanes (4, 8) and values (2, 2, …) at these strides in a column-major matrix."""
    values = torch.zeros(1, dtype=torch.long)
    for size, stride in zip(shape, strides, strict=True):  # the first index runs quickest
        values = (values[None, :] + stride * torch.arange(size)[:, None]).flatten()
    index = values.view(-1, 32).T
    return torch.stack([index % rows, index // rows], -1)


def ldmatrix(memory: Tensor, addresses: Sequence[int]) -> Tensor:
    """(32, 2 m) elements that each lane gets of ldmatrix.xm: memory is flat, of 2-byte elements.

    Lanes 8 j … 8 j + 7 give the addresses of the rows of 8 × 8 matrix j. Of row l / 4 of each, lane l gets elements
    2 (l % 4) and 2 (l % 4) + 1.
    """
    matrices = len(addresses) // 8
    places = [
        [addresses[8 * j + lane // 4] + 2 * (lane % 4) + half for j in range(matrices) for half in range(2)]
        for lane in range(32)
    ]
    return memory[torch.tensor(places)]


def mma(of_a: Tensor, of_b: Tensor) -> Tensor:
    """(32, 4) sums of each lane of A B, of (32, 8) and (32, 4) elements."""
    full_a, full_b = torch.zeros(16, 16), torch.zeros(16, 8)
    for full, held, formula in ((full_a, of_a, a), (full_b, of_b, b)):
        table = lanes(formula, held.shape[1])
        full[table[..., 0], table[..., 1]] = held
    table = lanes(c, 4)
    return (full_a @ full_b)[table[..., 0], table[..., 1]]
