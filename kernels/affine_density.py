"""z_0 = x_0, z_{i+1} = (x_{i+1} − xb_i) · exp(−xa_i): a flow block's affine map, with its log-det and its gradient.

Token i's output (xa, xb) transforms token i+1: token 0 passes unchanged, and the last output is unused.

    log_det_{i+1} = −Σ_d xa_i, in nats; log_det_0 = 0
    dx = dz · exp(−xa),  dxb = −dx,  dxa = −dz · z − dlog_det;  0 for the last output

A volume-preserving block has xa = 0 and no output for it. PyTorch takes a dozen passes over memory for this, forward
and backward; here each is one. Sums and products are in fp32, whatever the dtype of the outputs.

Of token 0 and the last output, one lacks an output and the other a token. Here they make a pair: every token then
reads, or in the backward pass writes, exactly one row of outputs, and token 0's counts as zeros.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tarflow_fast.errors import ArgumentError, BackendError

from .launch import DTYPES, Launch, can_launch, check_operand, launch

TILE = 1024
"""Values of x in a program, 8 for each thread of four warps: it asks for 6 to 12 KB before it needs any of them, and
takes few enough registers for a dozen programs on a multiprocessor, so that the memory is kept busy."""


def affine_density_reference(out: Tensor, x: Tensor, nvp: bool, flip: bool = False) -> tuple[Tensor, Tensor]:
    """`affine_density` as the equation says it, in x's dtype; differentiable."""
    x = x.flip(1) if flip else x
    before = F.pad(out.to(x.dtype)[:, :-1], (0, 0, 1, 0))  # row i is what transforms token i
    xa, xb = before.chunk(2, -1) if nvp else (torch.zeros_like(before), before)
    z = (x - xb) * torch.exp(-xa)
    return (z.flip(1) if flip else z), -xa.sum(-1)


@triton.jit
def _program_tokens(T, FLIP: tl.constexpr, BLOCK_T: tl.constexpr):
    """Which tokens are this program's: the image b, and its tokens' indices in the block's order, (BLOCK_T,).

    With them the rows, in int64, where they are in x and z, and where their output is in out.
    """
    programs = tl.cdiv(T, BLOCK_T)  # of one image
    b = (tl.program_id(0) // programs).to(tl.int64)
    token = tl.program_id(0) % programs * BLOCK_T + tl.arange(0, BLOCK_T)
    place = T - 1 - token if FLIP else token
    before = tl.where(token > 0, token, T) - 1
    return b, token, b * T + place, b * T + before


@triton.jit
def _affine_density_kernel(
    out_ptr,  # (B, T, 2D), or (B, T, D) unless NVP
    x_ptr,  # (B, T, D) fp32
    z_ptr,  # (B, T, D) fp32, written
    log_det_ptr,  # (B, T) fp32, written
    T,
    D: tl.constexpr,
    NVP: tl.constexpr,
    FLIP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b, token, place, before = _program_tokens(T, FLIP, BLOCK_T)
    d = tl.arange(0, BLOCK_D)[None, :]
    here = (token < T)[:, None] & (d < D)
    transformed = here & (token > 0)[:, None]
    at = place[:, None] * D + d
    x = tl.load(x_ptr + at, here, other=0.0)
    if NVP:
        output = before[:, None] * (2 * D) + d
        xa = tl.load(out_ptr + output, transformed, other=0.0).to(tl.float32)
        xb = tl.load(out_ptr + output + D, transformed, other=0.0).to(tl.float32)
        z = (x - xb) * tl.exp(-xa)
        log_det = 0.0 - tl.sum(xa, axis=1)
    else:
        z = x - tl.load(out_ptr + before[:, None] * D + d, transformed, other=0.0).to(tl.float32)
        log_det = tl.zeros((BLOCK_T,), tl.float32)
    tl.store(z_ptr + at, z, here)
    tl.store(log_det_ptr + b * T + token, log_det, token < T)


@triton.jit
def _affine_density_backward_kernel(
    dz_ptr,  # (B, T, D) fp32
    dlog_det_ptr,  # (B, T) fp32, at strides dlog_det_b, dlog_det_t
    z_ptr,  # (B, T, D) fp32, or None unless NVP
    out_ptr,  # (B, T, 2D), or None unless NVP
    dout_ptr,  # of out's shape and dtype, written
    dx_ptr,  # (B, T, D) fp32, written
    dlog_det_b,
    dlog_det_t,
    T,
    D: tl.constexpr,
    NVP: tl.constexpr,
    FLIP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b, token, place, before = _program_tokens(T, FLIP, BLOCK_T)
    d = tl.arange(0, BLOCK_D)[None, :]
    here = (token < T)[:, None] & (d < D)
    transformed = here & (token > 0)[:, None]
    at = place[:, None] * D + d
    dz = tl.load(dz_ptr + at, here, other=0.0)
    dtype = dout_ptr.dtype.element_ty
    if NVP:
        output = before[:, None] * (2 * D) + d
        xa = tl.load(out_ptr + output, transformed, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + at, here, other=0.0)
        dlog_det = tl.load(dlog_det_ptr + b * dlog_det_b + token * dlog_det_t, token < T, other=0.0)
        dx = dz * tl.exp(-xa)
        dxa = tl.where(transformed, -dz * z - dlog_det[:, None], 0.0)
        tl.store(dout_ptr + output, dxa.to(dtype), here)
        tl.store(dout_ptr + output + D, tl.where(transformed, -dx, 0.0).to(dtype), here)
    else:
        dx = dz
        tl.store(dout_ptr + before[:, None] * D + d, tl.where(transformed, -dx, 0.0).to(dtype), here)
    tl.store(dx_ptr + at, dx, here)


def _launch(kernel: Any, x: Tensor, *tensors: Any, nvp: bool, flip: bool) -> None:
    """Runs a kernel with one program for every BLOCK_T tokens of an image. x: (B, T, D), for the sizes."""
    if not can_launch(x.device):
        raise BackendError(f"affine_density: Triton kernels need a CUDA device, these tensors are on {x.device}")
    B, T, D = x.shape
    block_d = triton.next_power_of_2(D)
    block_t = min(triton.next_power_of_2(T), max(TILE // block_d, 1))
    warps = min(max(block_t * block_d // 256, 4), 32)
    constants = {"D": D, "NVP": nvp, "FLIP": flip, "BLOCK_T": block_t, "BLOCK_D": block_d}
    with torch.cuda.device_of(x):
        launch(Launch(kernel, (B * triton.cdiv(T, block_t),), (*tensors, T), constants, warps, pdl=False))


def density_forward(out: Tensor, x: Tensor, nvp: bool, flip: bool = False) -> tuple[Tensor, Tensor]:
    """z_0 = x_0, z_{i+1} = (x_{i+1} − xb_i) · exp(−xa_i), and the log-det of each token, −Σ_d xa in nats.

    out: (B, T, 2D) fp32, bf16 or fp16, xa and xb of every token in the block's order; (B, T, D), xb alone, unless nvp;
    x: (B, T, D) fp32; flip: x's tokens are in the opposite of the block's order (no pass over memory is spent on it).
    Returns z (B, T, D) fp32 in x's order and log_det (B, T) fp32 in the block's. Both arguments may have any strides:
    what is not contiguous is copied first. Only the first block's x is, a transposed view of the image, whose columns
    no kernel could read well. Differentiable once; under torch.compile too. Raises ArgumentError; BackendError
    where no kernel can run.
    """
    x = check_operand("x", x.contiguous(), (-1, -1, -1), torch.float32)
    B, T, D = x.shape
    out = check_operand("out", out.contiguous(), (B, T, 2 * D if nvp else D), DTYPES, x.device)
    z, log_det = torch.empty_like(x), torch.empty((B, T), dtype=torch.float32, device=x.device)
    _launch(_affine_density_kernel, x, out, x, z, log_det, nvp=nvp, flip=flip)
    return z, log_det


def density_backward(
    dz: Tensor, dlog_det: Tensor, z: Tensor | None, out: Tensor | None, dtype: torch.dtype, flip: bool
) -> tuple[Tensor, Tensor]:
    """dx = dz · exp(−xa), dxb = −dx, dxa = −dz · z − dlog_det; 0 for the last output.

    dz: (B, T, D) fp32; dlog_det: (B, T) fp32, read at its strides, as it is mostly one value a row, expanded;
    z, out: as `affine_density` returned and took them, or None if volume-preserving, whose gradients need neither;
    dtype: out's. Returns dout (B, T, 2D or D), of that dtype, and dx (B, T, D) fp32. Raises as `affine_density` does.
    """
    dz = check_operand("dz", dz.contiguous(), (-1, -1, -1), torch.float32)
    B, T, D = dz.shape
    if dlog_det.shape != (B, T):
        raise ArgumentError("dlog_det", f"shape {(B, T)}", tuple(dlog_det.shape))
    nvp = z is not None and out is not None
    if z is not None and out is not None:
        z = check_operand("z", z.contiguous(), (B, T, D), torch.float32, dz.device)
        out = check_operand("out", out.contiguous(), (B, T, 2 * D), dtype, dz.device)
    dout = torch.empty((B, T, 2 * D if nvp else D), dtype=dtype, device=dz.device)
    dx = torch.empty_like(dz)
    tensors = dz, dlog_det, z, out, dout, dx
    _launch(_affine_density_backward_kernel, dz, *tensors, *dlog_det.stride(), nvp=nvp, flip=flip)
    return dout, dx


# As operations of torch, which autograd and torch.compile know.
affine_density = torch.library.custom_op("tarflow_fast::affine_density", density_forward, mutates_args=())
affine_density_backward = torch.library.custom_op(
    "tarflow_fast::affine_density_backward", density_backward, mutates_args=()
)


@affine_density.register_fake
def _(out: Tensor, x: Tensor, nvp: bool, flip: bool = False) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:2])


@affine_density_backward.register_fake
def _(
    dz: Tensor, dlog_det: Tensor, z: Tensor | None, out: Tensor | None, dtype: torch.dtype, flip: bool
) -> tuple[Tensor, Tensor]:
    B, T, D = dz.shape
    return dz.new_empty((B, T, D if z is None else 2 * D), dtype=dtype), dz.new_empty(dz.shape)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    out, _, nvp, flip = inputs
    ctx.dtype, ctx.flip = out.dtype, flip
    ctx.save_for_backward(*((output[0], out) if nvp else (None, None)))


def _backward(ctx: Any, dz: Tensor, dlog_det: Tensor) -> tuple[Tensor, Tensor, None, None]:
    dout, dx = affine_density_backward(dz, dlog_det, *ctx.saved_tensors, ctx.dtype, ctx.flip)
    return dout, dx, None, None


affine_density.register_autograd(_backward, setup_context=_keep_for_backward)
