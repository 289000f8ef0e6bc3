"""y = RQS(x; φ), or x = RQS⁻¹(y; φ), with the log-derivative, from a network's outputs in one pass over memory.

The spline, and how its inverse is kept from failing, are told in `tarflow_fast/spline.py`, which is what a GPU would
otherwise do in some sixty passes over memory. A program takes the splines of a few values, and their bins are a
dimension of its blocks. All of it is in fp64, for the reason given there. Gradients of both directions are one kernel:
with y = f(x; p) and gradients gx of x and gl of −log f′,

    λ = (gx − gl · d(log f′)/dx) / f′,   dy = λ,   dp = −λ ∂f/∂p − gl ∂(log f′)/∂p

so that the inverse's are the forward map's at x for the gradients −λ of y and −gl of log f′.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tarflow_fast.errors import BackendError
from tarflow_fast.spline import SplineLaw

from .launch import Launch, can_launch, check_operand, launch

DTYPES = (torch.float32, torch.float64)
TILE, BACKWARD_TILE = 512, 256
"""The number of (value, bin) pairs of a program: four for each thread of four warps, or two in the backward pass, where
four would spill registers.
"""


@triton.jit
def _clip(p, BOUND: tl.constexpr):
    """Returns p / (1 + |p| / BOUND) and its derivative, or p and 1 where BOUND is 0."""
    if BOUND > 0:
        bottom = 1.0 + tl.abs(p) / BOUND
        return p / bottom, 1.0 / (bottom * bottom)
    else:
        return p, tl.full(p.shape, 1.0, tl.float64)


@triton.jit
def _wide(NUMBER: tl.constexpr):
    """Returns the number in fp64; as it stands, `tl.where` and comparisons would round it to fp32."""
    return tl.full([], NUMBER, tl.float64)


@triton.jit
def _sizes(
    pointer, mask, BINS: tl.constexpr, BLOCK_K: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    CLIP: tl.constexpr, LEAST: tl.constexpr, DIVISOR: tl.constexpr,
):  # fmt: skip
    """Returns the left and right ends of bins, their softmax and the derivative of the clip, (N, BLOCK_K) fp64 each.

    pointer, mask: (N, BLOCK_K), where the parameters are, and of which bins there are any.
    """
    k = tl.arange(0, BLOCK_K)[None, :]
    p, slope = _clip(tl.load(pointer, mask, other=0.0).to(tl.float64) / DIVISOR, CLIP / 2)
    p = tl.where(k < BINS, p, float("-inf"))
    e = tl.exp(p - tl.max(p, 1)[:, None])
    softmax = e / tl.sum(e, 1)[:, None]
    share = tl.where(k < BINS, LEAST + (1 - LEAST * BINS) * softmax, 0.0)
    right = LOW + (HIGH - LOW) * tl.cumsum(share, 1)
    left = tl.where(k == 0, _wide(LOW), right - (HIGH - LOW) * share)
    return left, tl.where(k == BINS - 1, _wide(HIGH), right), softmax, slope / DIVISOR


@triton.jit
def _pick(block, here):
    """Returns the value of each row of a block that is `here`, (N,)."""
    return tl.sum(tl.where(here, block, 0.0), 1)


@triton.jit
def _derivative(pointer, mask, CLIP: tl.constexpr, LEAST: tl.constexpr, EXPONENTIAL: tl.constexpr):
    """Returns the derivatives at knots and theirs by the parameters, (N,) fp64 each; 1 and 0 where there are none."""
    p, slope = _clip(tl.load(pointer, mask, other=0.0).to(tl.float64), CLIP)
    if EXPONENTIAL:
        value = tl.exp(p)
        slope *= value
    else:  # e^−|p| is below 1, and the rounding of 1 + e^−|p| is made up for
        e = tl.exp(-tl.abs(p))
        u = 1.0 + e
        log = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
        value = tl.where(p > 20.0, p, tl.where(p > 0, p, 0.0) + log)
        value = tl.where(p == p, value, p)
        slope *= tl.where(p > 0, 1.0, e) / u
    return tl.where(mask, LEAST + value, 1.0), tl.where(mask, slope, 0.0)


@triton.jit
def _between(x, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Returns x brought into the interval; a NaN stays one."""
    low, high = _wide(LOW), _wide(HIGH)
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def _at_least(x, LOW: tl.constexpr):
    """Returns the larger of x and LOW; a NaN stays one."""
    low = _wide(LOW)
    return tl.where(x < low, low, x)


@triton.jit
def _bin(
    parameters, row, inside, v, BINS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, CLIP: tl.constexpr,
    MIN_WIDTH: tl.constexpr, MIN_HEIGHT: tl.constexpr, MIN_DERIVATIVE: tl.constexpr, DIVISOR: tl.constexpr,
    EXPONENTIAL: tl.constexpr, TAILS: tl.constexpr, INVERSE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Returns the bins that values lie in: all that a value and its gradient need.

    They are x0, y0, w, h, d0, d1 and their number, (N,) fp64, then the softmax of widths and of heights with the
    derivatives of their clips, (N, BLOCK_K), and those of d0 and d1 by their parameters, (N,).
    """
    P: tl.constexpr = 3 * BINS - 1 if TAILS == 1 else 3 * BINS + 1
    TINY: tl.constexpr = 1.5e-154  # so that a bin whose size was rounded to 0 divides nothing by it
    k = tl.arange(0, BLOCK_K)[None, :]
    there = inside[:, None] & (k < BINS)
    first = parameters + row.to(tl.int64) * P
    place = first[:, None] + k
    x_left, x_right, x_softmax, x_slope = _sizes(place, there, BINS, BLOCK_K, LOW, HIGH, CLIP, MIN_WIDTH, DIVISOR)
    y_left, y_right, y_softmax, y_slope = _sizes(
        place + BINS, there, BINS, BLOCK_K, LOW, HIGH, CLIP, MIN_HEIGHT, DIVISOR
    )
    right = y_right if INVERSE else x_right
    number = tl.sum(tl.where((k < BINS - 1) & (right <= v[:, None]), 1, 0), 1)
    here = k == number[:, None]
    x0 = _pick(x_left, here)
    y0 = _pick(y_left, here)
    w = _at_least(_pick(x_right, here) - x0, TINY)
    h = _at_least(_pick(y_right, here) - y0, TINY)
    slopes = first + 2 * BINS + number
    if TAILS == 1:
        d0, s0 = _derivative(slopes - 1, inside & (number > 0), CLIP, MIN_DERIVATIVE, EXPONENTIAL)
        d1, s1 = _derivative(slopes, inside & (number < BINS - 1), CLIP, MIN_DERIVATIVE, EXPONENTIAL)
    else:
        d0, s0 = _derivative(slopes, inside, CLIP, MIN_DERIVATIVE, EXPONENTIAL)
        d1, s1 = _derivative(slopes + 1, inside, CLIP, MIN_DERIVATIVE, EXPONENTIAL)
    d0 = _at_least(d0, TINY)
    d1 = _at_least(d1, TINY)
    return x0, y0, w, h, d0, d1, number, x_softmax, y_softmax, x_slope, y_slope, s0, s1


@triton.jit
def spline_values(
    parameters, row, inside, given, BINS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, CLIP: tl.constexpr,
    MIN_WIDTH: tl.constexpr, MIN_HEIGHT: tl.constexpr, MIN_DERIVATIVE: tl.constexpr, DIVISOR: tl.constexpr,
    EXPONENTIAL: tl.constexpr, TAILS: tl.constexpr, INVERSE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Returns the images of values and the log-derivatives of the map, (N,) fp64 each.

    row: (N,), which row of the parameters is a value's. given: (N,) fp64, the values.
    """
    v = _between(given, LOW, HIGH)
    x0, y0, w, h, d0, d1, _, _, _, _, _, _, _ = _bin(
        parameters, row, inside, v, BINS, LOW, HIGH, CLIP, MIN_WIDTH, MIN_HEIGHT, MIN_DERIVATIVE, DIVISOR,
        EXPONENTIAL, TAILS, INVERSE, BLOCK_K,
    )  # fmt: skip
    if INVERSE:
        eta = _between((v - y0) / h, 0.0, 1.0)
        zeta = 1.0 - eta
        q = w * (d0 * zeta - d1 * eta)
        r = tl.sqrt(q * q + 4.0 * h * h * eta * zeta)
        a = tl.where(q < 0, r - q, 2.0 * h * eta)
        b = tl.where(q < 0, 2.0 * h * zeta, q + r)
        theta = a / (a + b)
        phi = b / (a + b)
    else:
        theta = _between((v - x0) / w, 0.0, 1.0)
        phi = 1.0 - theta
    bottom = h * (theta * theta + phi * phi) + w * (d0 + d1) * theta * phi
    top = w * (d1 * theta * theta + d0 * phi * phi) + 2.0 * h * theta * phi
    log = 2.0 * tl.log(h / bottom) + tl.log(top / w)
    if INVERSE:
        out = x0 + theta * w
        log = -log
    else:
        out = y0 + h * (h * theta * theta + w * d0 * theta * phi) / bottom
    out = _between(out, LOW, HIGH)  # beyond it, where rounding alone leads, the way back has no value
    outside = (given < _wide(LOW)) | (given > _wide(HIGH))
    out = tl.where(outside, given if TAILS else float("nan"), out)
    log = tl.where(outside, 0.0 if TAILS else float("nan"), log)
    return out, log


@triton.jit
def _spline_kernel(
    parameters, value, image, log_derivative, n, BINS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    CLIP: tl.constexpr, MIN_WIDTH: tl.constexpr, MIN_HEIGHT: tl.constexpr, MIN_DERIVATIVE: tl.constexpr,
    DIVISOR: tl.constexpr, EXPONENTIAL: tl.constexpr, TAILS: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < n
    given = tl.load(value + row, inside, other=0.0).to(tl.float64)
    out, log = spline_values(
        parameters, row, inside, given, BINS, LOW, HIGH, CLIP, MIN_WIDTH, MIN_HEIGHT, MIN_DERIVATIVE, DIVISOR,
        EXPONENTIAL, TAILS, INVERSE, BLOCK_K,
    )  # fmt: skip
    tl.store(image + row, out.to(image.dtype.element_ty), inside)
    tl.store(log_derivative + row, log.to(log_derivative.dtype.element_ty), inside)


@triton.jit
def _size_gradient(
    pointer, mask, k, number, g0, g1, softmax, slope, BINS: tl.constexpr, SPAN: tl.constexpr, LEAST: tl.constexpr
):  # fmt: skip
    """Store the gradient of the parameters of sizes, from those g0, g1 of the left and right end of the bin `number`.

    The left end is the sum of the sizes before the bin; the right end has its own besides, unless it is the last.
    """
    g1 = tl.where(number == BINS - 1, 0.0, g1)[:, None]
    share = tl.where(k < number[:, None], g0[:, None] + g1, tl.where(k == number[:, None], g1, 0.0))
    share *= SPAN * (1 - LEAST * BINS)
    gradient = slope * softmax * (share - tl.sum(softmax * share, 1)[:, None])
    tl.store(pointer, gradient.to(pointer.dtype.element_ty), mask)


@triton.jit
def _spline_backward_kernel(
    d_image, d_log_derivative, parameters, value, image, d_parameters, d_value, n, BINS: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, CLIP: tl.constexpr, MIN_WIDTH: tl.constexpr, MIN_HEIGHT: tl.constexpr,
    MIN_DERIVATIVE: tl.constexpr, DIVISOR: tl.constexpr, EXPONENTIAL: tl.constexpr, TAILS: tl.constexpr,
    INVERSE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < n
    given = tl.load(value + row, inside, other=0.0).to(tl.float64)
    outside = (given < _wide(LOW)) | (given > _wide(HIGH))
    x = tl.load((image if INVERSE else value) + row, inside, other=0.0).to(tl.float64)
    x = _between(tl.where(outside, _wide(LOW), x), LOW, HIGH)
    x0, _, w, h, d0, d1, number, x_softmax, y_softmax, x_slope, y_slope, s0, s1 = _bin(
        parameters, row, inside, x, BINS, LOW, HIGH, CLIP, MIN_WIDTH, MIN_HEIGHT, MIN_DERIVATIVE, DIVISOR,
        EXPONENTIAL, TAILS, False, BLOCK_K,
    )  # fmt: skip
    t = _between((x - x0) / w, 0.0, 1.0)
    f = 1.0 - t
    # y = y0 + h G / E and log y′ = 2 log h + log N − log w − 2 log E; X_t, X_w, X_h … are derivatives of X
    E = h * (t * t + f * f) + w * (d0 + d1) * t * f
    G = h * t * t + w * d0 * t * f
    N = w * (d1 * t * t + d0 * f * f) + 2.0 * h * t * f
    E_t = (f - t) * (w * (d0 + d1) - 2.0 * h)
    E_w = (d0 + d1) * t * f
    E_h = t * t + f * f
    E_d = w * t * f
    y_w = h * (d0 * t * f - G / E * E_w) / E
    y_h = (G + h * (t * t - G / E * E_h)) / E
    y_d0 = h * (w * t * f - G / E * E_d) / E
    y_d1 = -h * (G / E * E_d) / E
    slope = (h / E) * (h / E) * (N / w)
    l_t = (2.0 * w * (d1 * t - d0 * f) + 2.0 * h * (f - t)) / N - 2.0 * E_t / E
    l_w = (d1 * t * t + d0 * f * f) / N - 2.0 * E_w / E - 1.0 / w
    l_h = 2.0 * t * f / N - 2.0 * E_h / E + 2.0 / h
    l_d0 = w * f * f / N - 2.0 * E_d / E
    l_d1 = w * t * t / N - 2.0 * E_d / E
    gy = tl.load(d_image + row, inside, other=0.0).to(tl.float64)
    gl = tl.load(d_log_derivative + row, inside, other=0.0).to(tl.float64)
    through = tl.where(outside, gy if TAILS else 0.0, 0.0)
    gy = tl.where(outside, 0.0, gy)
    gl = tl.where(outside, 0.0, gl)
    if INVERSE:
        gv = (gy - gl * l_t / w) / slope
        gy = -gv
        gl = -gl
    else:
        gv = gy * slope + gl * l_t / w
    tl.store(d_value + row, (through + gv).to(d_value.dtype.element_ty), inside)
    g_t = gy * slope * w + gl * l_t
    g_w = gy * y_w + gl * l_w - g_t * t / w
    g_h = gy * y_h + gl * l_h
    P: tl.constexpr = 3 * BINS - 1 if TAILS == 1 else 3 * BINS + 1
    k = tl.arange(0, BLOCK_K)[None, :]
    place = d_parameters + row.to(tl.int64)[:, None] * P + k
    there = inside[:, None] & (k < BINS)
    _size_gradient(place, there, k, number, -g_t / w - g_w, g_w, x_softmax, x_slope, BINS, HIGH - LOW, MIN_WIDTH)
    _size_gradient(place + BINS, there, k, number, gy - g_h, g_h, y_softmax, y_slope, BINS, HIGH - LOW, MIN_HEIGHT)
    lower = number[:, None] - 1 if TAILS == 1 else number[:, None]  # which parameter d0 comes of; d1 comes of the next
    g0 = ((gy * y_d0 + gl * l_d0) * s0)[:, None]
    g1 = ((gy * y_d1 + gl * l_d1) * s1)[:, None]
    for start in tl.static_range(0, P - 2 * BINS, BLOCK_K):
        j = start + k
        gradient = tl.where(j == lower, g0, 0.0) + tl.where(j == lower + 1, g1, 0.0)
        mask = inside[:, None] & (j < P - 2 * BINS)
        tl.store(place + 2 * BINS + start, gradient.to(d_parameters.dtype.element_ty), mask)


def law_constants(law: SplineLaw) -> dict[str, object]:
    """Returns the constants of a law that kernels are compiled for."""
    given = {name.upper(): value for name, value in asdict(law).items()}
    given["CLIP"] = given.pop("SOFT_CLIP")
    given["TAILS"] = int(law.tails) + int(given.pop("ENDS") and law.tails)  # 2 with tails and ends
    return given


def _launch(kernel: Any, tile: int, n: int, law: SplineLaw, inverse: bool, *tensors: Tensor) -> None:
    """Run a kernel with one program for every BLOCK_N values, which have `tile` bins or few more."""
    if not can_launch(tensors[0].device):
        raise BackendError(f"spline: Triton kernels need a CUDA device, these tensors are on {tensors[0].device}")
    given = law_constants(law)
    block_k = triton.next_power_of_2(law.bins)
    block_n = min(max(tile // block_k, 1), triton.next_power_of_2(max(n, 1)))
    constants = {**given, "INVERSE": inverse, "BLOCK_N": block_n, "BLOCK_K": block_k}
    with torch.cuda.device_of(tensors[0]):
        launch(Launch(kernel, (triton.cdiv(n, block_n),), (*tensors, n), constants, 4, pdl=False))


def spline_forward(parameters: Tensor, value: Tensor, law: SplineLaw, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """Returns the images of values, y of x or with `inverse` x of y, and the log-derivatives of that map in nats.

    parameters: (n, P) fp32 or fp64, P = law.parameters, widths, heights and derivatives. value: (n,), of the same
    dtype. Both may have any strides, and what is not contiguous is copied first. Raises ArgumentError, or BackendError
    where no kernel can run.
    """
    value = check_operand("value", value.contiguous(), (-1,), DTYPES)
    wanted = (value.numel(), law.parameters)
    parameters = check_operand("parameters", parameters.contiguous(), wanted, value.dtype, value.device)
    image, log_derivative = torch.empty_like(value), torch.empty_like(value)
    if value.numel():
        _launch(_spline_kernel, TILE, value.numel(), law, inverse, parameters, value, image, log_derivative)
    return image, log_derivative


def spline_backward(
    d_image: Tensor,
    d_log_derivative: Tensor,
    parameters: Tensor,
    value: Tensor,
    image: Tensor,
    law: SplineLaw,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of the parameters, (n, P), and of the values, (n,), from those of the results.

    d_image, d_log_derivative: (n,), of the values' dtype. parameters, value, image: what `spline_forward` took and
    returned. Raises ArgumentError or BackendError.
    """
    value = check_operand("value", value.contiguous(), (-1,), DTYPES)
    n, like = value.numel(), (value.dtype, value.device)
    d_image = check_operand("d_image", d_image.contiguous(), (n,), *like)
    d_log_derivative = check_operand("d_log_derivative", d_log_derivative.contiguous(), (n,), *like)
    parameters = check_operand("parameters", parameters.contiguous(), (n, law.parameters), *like)
    image = check_operand("image", image.contiguous(), (n,), *like)
    d_parameters, d_value = torch.empty_like(parameters), torch.empty_like(value)
    if n:
        tensors = d_image, d_log_derivative, parameters, value, image, d_parameters, d_value
        _launch(_spline_backward_kernel, BACKWARD_TILE, n, law, inverse, *tensors)
    return d_parameters, d_value
