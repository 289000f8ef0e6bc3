"""The causal self-attention of the density pass runs in PyTorch's fused kernels, or in flash-attn if usable."""

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
    """Returns why flash-attn cannot serve these queries, or None if it can."""
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed (pip install 'tarflow_fast[flash]')"
    if q.device.type != "cuda":
        return f"flash-attn needs a CUDA tensor, these are on {q.device.type}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn needs float16 or bfloat16, these are {str(q.dtype).removeprefix('torch.')}"
    return None


def _explicit_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Computes `causal_attention` as matrix products, the softmax in fp32. q, k, v, result: (B, H, T, d)."""
    T, d = q.shape[-2:]
    scores = (q * d**-0.5) @ k.transpose(-1, -2)  # (B, H, T, T)
    scores = scores + scores.new_full((T, T), -math.inf).triu_(1)
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def _explicit_is_faster(q: Tensor) -> bool:
    """Returns whether matrix products are faster: on CPUs, torch's fused bf16 backward takes up to 8 times as long."""
    return (
        q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and q.requires_grad
        and torch.is_grad_enabled()
        and q.shape[-2] <= EXPLICIT_MAX_TOKENS  # the products keep T² scores for the backward pass
    )


def causal_attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
    """Returns softmax(q kᵀ / √d, causal) v, (B, T, H, d).

    q, k, v: (B, T, H, d), of one dtype and on one device. backend: "sdpa" is torch's scaled_dot_product_attention,
    "flash" is flash-attn, and "auto" is flash where it is usable, matrix products where bf16 is trained on a CPU with
    at most 512 tokens, else sdpa. Raises ArgumentError for another name, and BackendError when "flash" is asked for and
    cannot be had.
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
