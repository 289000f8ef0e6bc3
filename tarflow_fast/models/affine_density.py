"""What the density pass computes in one kernel where it can: Triton's on a GPU, else the same in PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..devices import triton_missing

HAS_TRITON = triton_missing() is None


def fused(x: Tensor) -> bool:
    """Whether kernels serve this tensor: fp32 on a GPU. Not in Triton's interpreter, which is for tests of kernels."""
    return x.is_cuda and x.dtype == torch.float32 and HAS_TRITON


def affine_density(out: Tensor, x: Tensor, nvp: bool, flip: bool = False) -> tuple[Tensor, Tensor]:
    """z_0 = x_0, z_{i+1} = (x_{i+1} − xb_i) · exp(−xa_i), and the log-det of each token, −Σ_d xa in nats.

    out: (B, T, 2D), xa and xb of every token in the block's order, or (B, T, D), xb alone, unless nvp; x: (B, T, D)
    fp32 or fp64, in which all is computed; flip: x's tokens are in the opposite of the block's order. Returns z
    (B, T, D) in x's order and the log-det (B, T) in the block's: 0 for the token that passes unchanged.
    """
    if fused(x):
        from ..kernels import affine_density as kernel  # imports triton, which nothing else here needs

        return kernel.affine_density(out, x, nvp, flip)
    if flip:
        x = x.flip(1)
    out = out.to(x.dtype)[:, :-1]
    if nvp:
        xa, xb = out.chunk(2, dim=-1)
        z = torch.cat([x[:, :1], (x[:, 1:] - xb) * (-xa).exp()], dim=1)
        log_det = F.pad(-xa.sum(-1), (1, 0))
    else:
        z = torch.cat([x[:, :1], x[:, 1:] - out], dim=1)
        log_det = x.new_zeros(x.shape[:2])
    return (z.flip(1) if flip else z), log_det
