"""Causal attention of the density pass: every way of computing it against the equation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import random_images, random_model
from tolerances import error_budget, max_error
from torch import Tensor

from tarflow_fast.errors import ArgumentError, BackendError
from tarflow_fast.models.attention import EXPLICIT_MAX_TOKENS, causal_attention


class TestAttention:
    @pytest.mark.parametrize("backend", ["auto", "sdpa"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("train", [False, True])
    @pytest.mark.parametrize("T", [1, 7, EXPLICIT_MAX_TOKENS + 1])
    def test_is_the_equation(self, backend: str, dtype: torch.dtype, train: bool, T: int) -> None:
        def equation(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            logits = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
            future = torch.ones(T, T, dtype=torch.bool).triu(1)
            return torch.einsum("bhij,bjhd->bihd", logits.masked_fill(future, -math.inf).softmax(-1), v)

        q, k, v = (2 * torch.randn(2, T, 3, 16, dtype=torch.float64).to(dtype) for _ in range(3))
        exact, plain = equation(q.double(), k.double(), v.double()), equation(q, k, v)
        with torch.set_grad_enabled(train):
            out = causal_attention(q.requires_grad_(train), k, v, backend)
        assert out.dtype == dtype
        assert max_error(out, exact) <= error_budget(plain, exact, dtype)
        assert out.requires_grad == train

    @pytest.mark.skipif(torch.cuda.is_available(), reason="flash-attn may be usable")
    def test_flash_says_why_not(self) -> None:
        model = random_model().set_attention("flash")
        with pytest.raises(BackendError, match=r"'flash': flash-attn (is not installed|needs a CUDA)"):
            model(random_images(model, 2))

    @pytest.mark.parametrize("backend", ["fast", "", None, 1])
    def test_unknown(self, backend: Any) -> None:
        with pytest.raises(ArgumentError, match="attention: expected one of 'auto', 'sdpa', 'flash'"):
            random_model().set_attention(backend)
        with pytest.raises(ArgumentError, match="attention: expected one of"):
            causal_attention(*torch.zeros(3, 1, 2, 1, 4), backend)
