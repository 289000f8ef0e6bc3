"""The operations between two passes equal torch's, for every dtype, stride and value, and share no memory with it."""

from __future__ import annotations

import pytest
import torch

from tarflow_fast import serial

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
contiguous = pytest.mark.parametrize("contiguous", [True, False])


def tokens(dtype: torch.dtype, contiguous: bool) -> torch.Tensor:
    x = torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x if contiguous else x.transpose(0, 2).contiguous().transpose(0, 2)


@every_dtype
@contiguous
def test_copies(dtype: torch.dtype, contiguous: bool) -> None:
    x = tokens(dtype, contiguous)
    for got, wanted in ((serial.copy(x), x), (serial.flipped(x), x.flip(1))):
        assert torch.equal(got, wanted)
        assert got.dtype == dtype
        assert got.is_contiguous()
        assert got.data_ptr() != x.data_ptr()


@every_dtype
@contiguous
def test_all_finite(dtype: torch.dtype, contiguous: bool) -> None:
    x = tokens(dtype, contiguous)
    assert serial.all_finite(x)
    x[1, 2, 0], x[3, 4, 1], x[0, 0, 2] = torch.nan, torch.inf, -torch.inf
    assert not serial.all_finite(x)
    assert torch.equal(serial.all_finite(x, 1), torch.tensor([False, False, True, False, True]))
    assert (~serial.all_finite(x, 2)).nonzero().tolist() == [[0, 0], [1, 2], [3, 4]]


@every_dtype
@contiguous
def test_scaled(dtype: torch.dtype, contiguous: bool) -> None:
    x = tokens(dtype, contiguous)
    factor = torch.rand(7, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = serial.scaled(x, factor)
    assert torch.equal(got, x * factor)
    assert got.dtype == dtype


def test_gradients_are_left_behind() -> None:
    x = torch.ones(1, 2, 3, requires_grad=True)
    assert not any(f(x).requires_grad for f in (serial.copy, serial.flipped, serial.all_finite))
