"""z = (x − t) exp(−s) where values change, s = bound · tanh(raw / bound), with its log-det, inverse and gradients.

The equations of both directions are told in `tarflow_fast/fused/affine_coupling.py`. PyTorch takes a dozen passes over
memory for them; here each direction is one, and so are its gradients. Where values pass, their parameters are not read.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tarflow_fast.errors import ArgumentError, BackendError

from .launch import Launch, can_launch, check_operand, launch

DTYPES = (torch.float32, torch.float64)
TILE = 1024
"""The number of values that a program takes at once, 8 for each thread of four warps, as in `affine_density`."""


@triton.jit
def _tanh(x):
    """Returns tanh x = (1 − e)/(1 + e), e = exp(−2|x|), with the sign of x."""
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def _affine_coupling_kernel(
    parameters_ptr,  # (B, 2, N), or (B, 1, N) unless SCALED
    value_ptr,  # (B, N)
    changes_ptr,  # (N,)
    image_ptr,  # (B, N), written
    log_det_ptr,  # (B,), written
    N,
    BOUND: tl.constexpr,
    SCALED: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    shift = parameters_ptr + b * N * (2 if SCALED else 1)
    total = tl.zeros((BLOCK,), value_ptr.dtype.element_ty)
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        here = n < N
        changed = here & (tl.load(changes_ptr + n, here, other=0.0) != 0)
        value = tl.load(value_ptr + b * N + n, here, other=0.0)
        t = tl.load(shift + n, changed, other=0.0)
        if SCALED:
            s = BOUND * _tanh(tl.load(shift + N + n, changed, other=0.0) / BOUND)
            total += s
            image = value * tl.exp(s) + t if INVERSE else (value - t) * tl.exp(-s)
        else:
            image = value + t if INVERSE else value - t
        tl.store(image_ptr + b * N + n, image, here)
    log_det = tl.sum(total, 0)
    tl.store(log_det_ptr + b, log_det if INVERSE else 0.0 - log_det)


@triton.jit
def _affine_coupling_backward_kernel(
    d_image_ptr,  # (B, N)
    d_log_det_ptr,  # (B,)
    parameters_ptr,  # (B, 2, N), or (B, 1, N) unless SCALED
    latents_ptr,  # (B, N), z of both directions
    changes_ptr,  # (N,)
    d_parameters_ptr,  # the shape of parameters, written
    d_value_ptr,  # (B, N), written
    N,
    BOUND: tl.constexpr,
    SCALED: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(N, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    here = n < N
    changed = here & (tl.load(changes_ptr + n, here, other=0.0) != 0)
    d_image = tl.load(d_image_ptr + b * N + n, here, other=0.0)
    first = b * N * (2 if SCALED else 1) + n
    d_value = d_image
    if SCALED:
        tanh = _tanh(tl.load(parameters_ptr + first + N, changed, other=0.0) / BOUND)
        z = tl.load(latents_ptr + b * N + n, here, other=0.0)
        d_log_det = tl.load(d_log_det_ptr + b)
        if INVERSE:
            d_value = d_image * tl.exp(BOUND * tanh)
            d_s = d_value * z + d_log_det
        else:
            d_value = d_image * tl.exp(-BOUND * tanh)
            d_s = -d_image * z - d_log_det
        tl.store(d_parameters_ptr + first + N, tl.where(changed, d_s * (1.0 - tanh * tanh), 0.0), here)
    d_shift = d_image if INVERSE else -d_value
    tl.store(d_parameters_ptr + first, tl.where(changed, d_shift, 0.0), here)
    tl.store(d_value_ptr + b * N + n, d_value, here)


def _launch(kernel: Any, programs: int, *tensors: Tensor, n: int, **constants: object) -> None:
    if not can_launch(tensors[0].device):
        raise BackendError(f"affine_coupling: Triton kernels need a CUDA device, not {tensors[0].device}")
    with torch.cuda.device_of(tensors[0]):
        launch(Launch(kernel, (programs,), (*tensors, n), constants, 4, pdl=False))


def _checked(parameters: Tensor, value: Tensor, changes: Tensor) -> tuple[int, int, bool]:
    """Returns B, N and whether there is a scale. Raises ArgumentError unless the operands fit each other."""
    check_operand("value", value, (-1, -1), DTYPES)
    B, N = value.shape
    if parameters.dim() != 3 or parameters.shape[1] not in (1, 2):
        raise ArgumentError("parameters", f"shape {(B, 2, N)} or {(B, 1, N)}", tuple(parameters.shape))
    check_operand("parameters", parameters, (B, -1, N), value.dtype, value.device)
    check_operand("changes", changes, (N,), value.dtype, value.device)
    return B, N, parameters.shape[1] == 2


def _block(N: int) -> int:
    return min(triton.next_power_of_2(max(N, 1)), TILE)


def coupling_forward(
    parameters: Tensor, value: Tensor, changes: Tensor, bound: float, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns z of x, or with `inverse` x of z, (B, N), and the log-determinant of that map, (B,) in nats.

    parameters: (B, 2, N) fp32 or fp64, t and the raw log-scale, or (B, 1, N), t alone. value: (B, N). changes: (N,),
    1 where values change. All have one dtype and are contiguous. bound: that of the log-scale. Raises ArgumentError, or
    BackendError where no kernel can run.
    """
    B, N, scaled = _checked(parameters, value, changes)
    image, log_det = torch.empty_like(value), torch.empty(B, dtype=value.dtype, device=value.device)
    constants = {"BOUND": bound, "SCALED": scaled, "INVERSE": inverse, "BLOCK": _block(N)}
    _launch(_affine_coupling_kernel, B, parameters, value, changes, image, log_det, n=N, **constants)
    return image, log_det


def coupling_backward(
    d_image: Tensor,
    d_log_det: Tensor,
    parameters: Tensor,
    latents: Tensor,
    changes: Tensor,
    bound: float,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of the parameters and of the values from those of the results, d_image and d_log_det.

    latents: (B, N), z: what `coupling_forward` returned, or with `inverse` what it took. The others are as there, and
    all are contiguous. Raises ArgumentError, or BackendError where no kernel can run.
    """
    B, N, scaled = _checked(parameters, latents, changes)
    check_operand("d_image", d_image, (B, N), latents.dtype, latents.device)
    check_operand("d_log_det", d_log_det, (B,), latents.dtype, latents.device)
    d_parameters, d_value = torch.empty_like(parameters), torch.empty_like(latents)
    constants = {"BOUND": bound, "SCALED": scaled, "INVERSE": inverse, "BLOCK": _block(N)}
    tensors = d_image, d_log_det, parameters, latents, changes, d_parameters, d_value
    _launch(_affine_coupling_backward_kernel, B * triton.cdiv(N, _block(N)), *tensors, n=N, **constants)
    return d_parameters, d_value
