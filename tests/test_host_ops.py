"""The operations between two passes equal torch's, for every dtype, stride and value, and share no memory with it."""

from __future__ import annotations

import pytest
import torch
from tolerances import SAME_F64, assert_close

from tarflow_fast import host_ops

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
    for got, wanted in ((host_ops.copy(x), x), (host_ops.reordered(x, range(x.shape[1])[::-1]), x.flip(1))):
        assert torch.equal(got, wanted)
        assert got.dtype == dtype
        assert got.is_contiguous()
        assert got.data_ptr() != x.data_ptr()


@every_dtype
@contiguous
def test_all_finite(dtype: torch.dtype, contiguous: bool) -> None:
    x = tokens(dtype, contiguous)
    assert host_ops.all_finite(x)
    x[1, 2, 0], x[3, 4, 1], x[0, 0, 2] = torch.nan, torch.inf, -torch.inf
    assert not host_ops.all_finite(x)
    assert torch.equal(host_ops.all_finite(x, 1), torch.tensor([False, False, True, False, True]))
    assert (~host_ops.all_finite(x, 2)).nonzero().tolist() == [[0, 0], [1, 2], [3, 4]]


@every_dtype
@contiguous
def test_scaled(dtype: torch.dtype, contiguous: bool) -> None:
    x = tokens(dtype, contiguous)
    factor = torch.rand(7, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = host_ops.scaled(x, factor)
    assert torch.equal(got, x * factor)
    assert got.dtype == dtype


@every_dtype
@contiguous
def test_add_scaled(dtype: torch.dtype, contiguous: bool) -> None:
    x, direction = tokens(dtype, contiguous), tokens(dtype, not contiguous)
    got = host_ops.add_scaled(x, direction, 0.5)
    assert torch.equal(got, x + 0.5 * direction)
    assert got.dtype == dtype


@every_dtype
@contiguous
def test_rearranged(dtype: torch.dtype, contiguous: bool) -> None:
    x = tokens(dtype, contiguous)
    for split, order, shape in (((5, 7, 3, 1), (2, 0, 3, 1), (3, 35)), ((5, 7, 3), (0, 1, 2), (35, 3))):
        got = host_ops.rearranged(x, split, order, shape)
        assert torch.equal(got, x.reshape(split).permute(order).reshape(shape))
        assert got.dtype == dtype
        assert got.is_contiguous()
        assert got.data_ptr() != x.data_ptr()


@every_dtype
@contiguous
def test_rows(dtype: torch.dtype, contiguous: bool) -> None:
    x, rows = tokens(dtype, contiguous), torch.tensor([4, 0, 0, -1])
    assert torch.equal(host_ops.rows_of(x, rows), x[rows])
    target, wanted = tokens(dtype, contiguous), tokens(dtype, contiguous)
    wanted[[3, 1]] = x[:2]
    host_ops.put_rows(target, [3, 1], x[:2])
    assert torch.equal(target, wanted)


@every_dtype
@contiguous
@pytest.mark.parametrize("to", DTYPES, ids=str)
def test_converted(dtype: torch.dtype, to: torch.dtype, contiguous: bool) -> None:
    x = tokens(dtype, contiguous)
    got = host_ops.converted(x.requires_grad_(), "cpu", to)
    assert torch.equal(got, x.to(to))
    assert got.dtype == to
    assert not got.requires_grad
    assert got.data_ptr() != x.data_ptr()


@every_dtype
def test_gaussian_log_prob(dtype: torch.dtype) -> None:
    z, var = tokens(dtype, True), torch.rand(7, 3, generator=torch.Generator().manual_seed(1)).to(dtype) + 0.5
    wanted = torch.distributions.Normal(0.0, var.double().sqrt()).log_prob(z.double()).sum((1, 2))
    got = host_ops.gaussian_log_prob(z, var)
    assert got.dtype == dtype
    assert_close(got, wanted, 40 * torch.finfo(dtype).eps * wanted.abs().max().item())


def test_what_autograd_records() -> None:
    """Rearranging and densities keep their gradients, as torch's own would."""
    z = tokens(torch.float64, True).requires_grad_()
    var = torch.full((7, 3), 2.0, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(host_ops.gaussian_log_prob(z, var).sum(), z)
    assert_close(gradient, -z / 2, SAME_F64)
    assert host_ops.rearranged(z, (5, 7, 3), (1, 0, 2), (7, 15)).requires_grad
    with torch.no_grad():
        assert not host_ops.rearranged(z, (5, 7, 3), (1, 0, 2), (7, 15)).requires_grad


def test_torch_serves_transforms_and_float8() -> None:
    x = tokens(torch.float32, True)
    moved = torch.func.vmap(lambda row: host_ops.rearranged(row, (7, 3), (1, 0), (21,)))(x)
    assert torch.equal(moved, x.transpose(1, 2).flatten(1))
    assert host_ops.converted(x.to(torch.float8_e4m3fn), "cpu", torch.float32).isfinite().all()


def test_gradients_are_left_behind() -> None:
    x = torch.ones(1, 2, 3, requires_grad=True)
    assert not any(
        f(x).requires_grad for f in (host_ops.copy, lambda x: host_ops.reordered(x, [1, 0]), host_ops.all_finite)
    )
