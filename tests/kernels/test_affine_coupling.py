"""The coupling's kernels against PyTorch: both directions, gradients, masks, and what is refused."""

from __future__ import annotations

import pytest
import torch
from cases import KERNEL_DEVICE
from tolerances import SAME_F32, SAME_F64, assert_close
from torch import Tensor

from tarflow_fast.errors import ArgumentError
from tarflow_fast.fused.affine_coupling import _AffineCoupling
from tarflow_fast.kernels import affine_coupling as kernel

SIZES = [(3, 2), (2, 33), (2, 1500)]  # B, N: few values, an odd number, more than a program takes at once
every_size = pytest.mark.parametrize("size", SIZES, ids=str)
both_ways = pytest.mark.parametrize("inverse", [False, True])


def problem(size: tuple[int, int], outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Returns parameters, values and where these change."""
    B, N = size
    generator = torch.Generator().manual_seed(0)
    parameters, value = (torch.randn(B, k, N, generator=generator, dtype=dtype) for k in (outputs, 1))
    changes = (torch.rand(N, generator=generator) < 0.5).to(dtype)
    return tuple(x.to(KERNEL_DEVICE) for x in (3 * parameters, value[:, 0].contiguous(), changes))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that comes uninitialised holds NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, torch.nan))
    monkeypatch.setattr(torch, "empty", lambda *size, **how: empty(*size, **how).fill_(torch.nan))


@both_ways
@every_size
@pytest.mark.parametrize("outputs", [1, 2])
def test_results_and_gradients_are_those_of_the_equation(size: tuple[int, int], outputs: int, inverse: bool) -> None:
    for dtype, tolerance in ((torch.float32, SAME_F32), (torch.float64, SAME_F64)):
        parameters, value, changes = problem(size, outputs, dtype)
        op = _AffineCoupling(changes, 2.0, inverse)
        exact = [x.double().requires_grad_() for x in (parameters, value)]
        wanted = _AffineCoupling(changes.double(), 2.0, inverse).plain(*exact)
        seeds = [torch.cos(torch.arange(x.numel(), device=x.device, dtype=dtype)).view_as(x) for x in wanted]
        loss = sum((x * seed.double()).sum() for x, seed in zip(wanted, seeds, strict=True))
        assert isinstance(loss, Tensor)
        got = op.run("triton", parameters, value)
        gradients = op.back("triton", *seeds, parameters, value, got[0])
        for ours, theirs in zip((*got, *gradients), (*wanted, *torch.autograd.grad(loss, exact)), strict=True):
            assert ours.dtype == dtype
            assert_close(ours, theirs, tolerance * (1 + float(theirs.detach().abs().max())))


def test_values_that_pass_keep_their_bits_and_know_no_parameters() -> None:
    parameters, value, changes = problem((2, 33), 2, torch.float32)
    parameters[:, :, changes == 0] = torch.nan
    z, log_det = kernel.coupling_forward(parameters, value, changes, 2.0)
    assert torch.equal(z[:, changes == 0], value[:, changes == 0])
    assert torch.isfinite(z).all()
    assert torch.isfinite(log_det).all()


def test_operands_that_do_not_fit_are_refused() -> None:
    parameters, value, changes = problem((2, 33), 2, torch.float32)
    for wrong in (
        {"parameters": parameters[:, :, :-1]},
        {"parameters": parameters[:, 0]},
        {"value": value.double()},
        {"changes": changes[:-1]},
    ):
        given = {"parameters": parameters, "value": value, "changes": changes, **wrong}
        with pytest.raises(ArgumentError, match=r"^(parameters|changes): expected "):
            kernel.coupling_forward(*given.values(), 2.0)
