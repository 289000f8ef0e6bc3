"""The density pass's affine transform is one Triton kernel where a probe has proven it, else PyTorch's operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..devices import triton_missing
from ..probe import density_proven

HAS_TRITON = triton_missing() is None


def fused(x: Tensor, nvp: bool) -> bool:
    """Returns whether kernels serve this tensor, which they do in fp32 on a GPU where a probe has proven them.

    x: (B, T, D), the tokens. nvp: whether they are scaled. Triton's interpreter serves none, as it is for the tests of
    kernels.
    """
    if not (x.is_cuda and x.dtype == torch.float32 and HAS_TRITON):
        return False
    return density_proven(x.device, x.shape[1], x.shape[2], nvp)


def affine_density(out: Tensor, x: Tensor, nvp: bool, flip: bool = False) -> tuple[Tensor, Tensor]:
    """z_0 = x_0, z_{i+1} = (x_{i+1} − xb_i) · exp(−xa_i), and the log-det of each token is −Σ_d xa in nats.

    out: (B, T, 2D), xa and xb of every token in the block's order; (B, T, D), xb alone, unless nvp. x: (B, T, D) fp32
    or fp64, the tokens, in whose dtype all is computed. nvp: whether `out` has xa. flip: whether x's tokens are in the
    opposite of the block's order. Returns z (B, T, D) in x's order and the log-det (B, T) in the block's, which is 0
    for the token that passes unchanged.
    """
    if fused(x, nvp):
        from ..kernels import affine_density as kernel  # this imports triton, which nothing else here needs

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
