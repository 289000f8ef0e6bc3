"""The torch backend's linear layer: every product it chooses from gives the same result."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close, error_budget, max_error

from tarflow_fast.backend.pytorch.linear import ONEDNN_ROWS, Linear


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rows", [1, ONEDNN_ROWS - 1, ONEDNN_ROWS, 65])
@pytest.mark.parametrize(("width", "out"), [(64, 192), (48, 7), (1, 64)])
def test_linear_is_linear(rows: int, width: int, out: int, fused: bool, gelu: bool) -> None:
    x, weight, bias = torch.randn(rows, width), torch.randn(out, width), torch.randn(out)
    wanted = F.linear(x.double(), weight.double(), bias.double())
    wanted = F.gelu(wanted) if gelu else wanted
    linear = Linear(weight, bias, gelu=gelu, fused=fused)
    for _ in range(2):  # the second call finds the weight packed
        assert_close(linear(x), wanted, 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(9, 64), torch.randn(32, 64), torch.randn(32)
    exact = F.gelu(F.linear(x.to(dtype).double(), weight.to(dtype).double(), bias.to(dtype).double()))
    got = Linear(weight.to(dtype), bias.to(dtype), gelu=True)(x.to(dtype))
    assert got.dtype == dtype
    plain = F.gelu(F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype)))
    assert max_error(got, exact) <= error_budget(plain, exact, dtype)
