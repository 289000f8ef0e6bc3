"""GELU and exp of the native CPU engine on each instruction set, against exact values."""

from __future__ import annotations

import math

import torch
from instruction_sets import every_set
from torch import Tensor

from tarflow_fast.native import load_native


def elementary(name: str, isa: str, x: Tensor) -> Tensor:
    out = torch.full_like(x, torch.nan)
    load_native().elementary(name, isa, x.data_ptr(), out.data_ptr(), x.numel())
    return out


@every_set
def test_gelu(isa: str) -> None:
    """Within 3e-7 (2e-7 with fused multiply-add) and one rounding of the exact value; NaN stays NaN."""
    x = torch.linspace(-12, 12, 160_000)
    exact = 0.5 * x.double() * torch.special.erfc(-x.double() / math.sqrt(2))
    error = (elementary("gelu", isa, x).double() - exact).abs()
    assert (error <= 3e-7 + 6e-8 * exact.abs()).all(), error.max()
    assert elementary("gelu", isa, torch.full((16,), torch.nan)).isnan().all()
    assert torch.equal(elementary("gelu", isa, torch.full((16,), 1e30)), torch.full((16,), 1e30))


@every_set
def test_exp(isa: str) -> None:
    """For x <= 0, relative error of 2e-7 down to exp(−87), and 0 below."""
    x = torch.linspace(-87, 0, 160_000)
    exact = x.double().exp()
    assert ((elementary("exp", isa, x).double() - exact).abs() <= 2e-7 * exact).all()
    assert torch.equal(elementary("exp", isa, torch.zeros(16)), torch.ones(16))
    low = torch.tensor([-88.0, -1e4, -1e30, -torch.inf]).repeat(4)
    assert torch.equal(elementary("exp", isa, low), torch.zeros(16))
    assert elementary("exp", isa, torch.full((16,), torch.nan)).isnan().all()
