"""Causal self-attention for the density pass: PyTorch's fused kernels, or flash-attn where it can be used."""

from __future__ import annotations

import importlib.util
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError, BackendError

ATTENTION_BACKENDS = ("auto", "sdpa", "flash")
EXPLICIT_MAX_TOKENS = 512


def flash_unusable(q: Tensor) -> str | None:
    """Why flash-attn cannot serve these queries, or None if it can."""
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed (pip install 'tarflow_fast[flash]')"
    if q.device.type != "cuda":
        return f"flash-attn needs a CUDA tensor, these are on {q.device.type}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn needs float16 or bfloat16, these are {str(q.dtype).removeprefix('torch.')}"
    return None


def _explicit_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """causal_attention as matrix products, the softmax in fp32. q, k, v: (B, H, T, d); returns the same."""
    T, d = q.shape[-2:]
    scores = (q * d**-0.5) @ k.transpose(-1, -2)  # (B, H, T, T)
    scores = scores + scores.new_full((T, T), -math.inf).triu_(1)
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def _explicit_is_faster(q: Tensor) -> bool:
    """torch's fused kernel for CPUs takes up to 8 times as long for a bf16 backward as matrix products."""
    return (
        q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and q.requires_grad
        and torch.is_grad_enabled()
        and q.shape[-2] <= EXPLICIT_MAX_TOKENS  # they keep T² scores
    )


def causal_attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
    """softmax(q kᵀ / √d, causal) v.

    q, k, v: (B, T, H, d), one dtype and device. backend: "sdpa" (torch's scaled_dot_product_attention),
    "flash" (flash-attn), or "auto": flash where it is usable, matrix products to train in bf16 on a CPU,
    else sdpa. Returns (B, T, H, d). Raises BackendError when "flash" is asked for and cannot be had.
    """
    if backend not in ATTENTION_BACKENDS:
        raise ArgumentError("attention", f"one of {ATTENTION_BACKENDS}", repr(backend))
    if backend != "sdpa":
        reason = flash_unusable(q)
        if reason is None:
            from flash_attn import flash_attn_func  # type: ignore[import-not-found, unused-ignore]

            out: Tensor = flash_attn_func(q, k, v, causal=True)
            return out
        if backend == "flash":
            raise BackendError(f"attention='flash': {reason}")
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if backend == "auto" and _explicit_is_faster(q):
        return _explicit_attention(q, k, v).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
