"""x = f⁻¹(z) of a masked autoregressive transform, with log|det dx/dz|, by one program for each tile of samples.

A program takes its samples through all steps of the inverse. Units of the network lie in memory as [unit][sample], and
what they read is a prefix of what is known, so a step is a few small products against weights that all programs read in
the same order. What a step is, a table says, which the host makes once (`backend/triton/masked.py`): an entry is up to
`ROWS` units of a layer, or parameters of a step, or dimensions. Products and activations are fp32, univariate
transforms fp64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tarflow_fast.errors import BackendError

from .launch import Launch, can_launch, check_operand, dot, launch
from .spline import spline_values

ROWS = 16  # the most units of an entry, and what a product takes for them
TILE = 16  # samples of a program: few, so that a batch has many programs
REGISTERS = 128  # of a thread; left alone, the compiler for sm_100 keeps one on the stack to have fewer
FIELDS = (
    "kind", "first", "count", "inputs", "weight", "read_from", "bias", "raw", "read_to", "scale", "shift", "add",
    "offset", "gate", "active", "unused",
)  # fmt: skip
"""The fields of an entry of the table, int32, with −1 for what there is not.

kind: `UNITS`, `PARAMETERS`, `TRANSFORMED` or `PASSED`. first: the first dimension, or where among a step's parameters
the first unit goes. count: of units or dimensions. weight, bias, scale, shift: where they begin in the tensors
`weights` and `vectors`. read_from, raw, read_to: rows of `units`, where a product begins to read, and where values go
as they are, and as the layer that reads them has them. add: where in `adds` the rows begin that are added. offset,
gate: rows of `terms`. active: whether the layer that reads has an activation.
"""
UNITS, PARAMETERS, TRANSFORMED, PASSED = range(4)
ACTIVATIONS = ("identity", "relu", "leaky_relu", "elu", "tanh", "sigmoid", "silu", "softplus", "gelu", "sin", "wrap")
LAWS = ("softclip", "softplus", "sigmoid", "exp", "shift", "spline")


@triton.jit
def _softplus(x):
    """Returns log(1 + exp(x)), x above 20, as torch has it."""
    y = tl.where(x > 0, x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))
    return tl.where(x > 20.0, x, tl.where(x == x, y, x))


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def _activated(h, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
    """Returns the activation of h. No comparison hides a NaN."""
    if ACTIVATION == 1:
        h = tl.where(h < 0, 0.0, h)
    elif ACTIVATION == 2:
        h = tl.where(h < 0, h * ALPHA, h)
    elif ACTIVATION == 3:
        h = tl.where(h < 0, ALPHA * (tl.exp(tl.where(h < 0, h, 0.0)) - 1.0), h)
    elif ACTIVATION == 4:
        e = tl.exp(-2.0 * tl.abs(h))
        h = tl.where(h < 0, e - 1.0, 1.0 - e) / (1.0 + e)
    elif ACTIVATION == 5:
        h = _sigmoid(h)
    elif ACTIVATION == 6:
        h *= _sigmoid(h)
    elif ACTIVATION == 7:
        h = _softplus(h)
    elif ACTIVATION == 8:
        h *= 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))
    elif ACTIVATION == 9:
        h = tl.sin(h)
    elif ACTIVATION == 10:
        h -= 2.0 * ALPHA * tl.floor(h / (2.0 * ALPHA)) + ALPHA
    return h


@triton.jit
def _make_known(
    h, entry, units, vectors, stride, r, there, sample, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr
):  # fmt: skip
    """Store units, (N, TILE), as they are where a layer adds them, and as the layer that reads them has them."""
    raw, to = tl.load(entry + 7), tl.load(entry + 8)
    column = sample[None, :].to(tl.int64)
    if raw >= 0:
        tl.store(units + (raw + r).to(tl.int64)[:, None] * stride + column, h, there[:, None])
    if to >= 0:
        scale, shift = tl.load(entry + 9), tl.load(entry + 10)
        if scale >= 0:
            h *= tl.load(vectors + scale + r, there, other=0.0)[:, None]
        if shift >= 0:
            h += tl.load(vectors + shift + r, there, other=0.0)[:, None]
        if tl.load(entry + 14) > 0:
            h = _activated(h, ACTIVATION, ALPHA)
        tl.store(units + (to + r).to(tl.int64)[:, None] * stride + column, h, there[:, None])


@triton.jit
def _masked_inverse_kernel(
    table, entries, weights, vectors, adds, terms, term_stride, units, parameters, z, x, log_det, stride, per_sample,
    LAW: tl.constexpr, FLOOR: tl.constexpr, SHIFT_FIRST: tl.constexpr, P: tl.constexpr, ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr, BINS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, CLIP: tl.constexpr,
    MIN_WIDTH: tl.constexpr, MIN_HEIGHT: tl.constexpr, MIN_DERIVATIVE: tl.constexpr, DIVISOR: tl.constexpr,
    EXPONENTIAL: tl.constexpr, TAILS: tl.constexpr, BLOCK_BINS: tl.constexpr, N_FIELDS: tl.constexpr,
    N_ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    r, k = tl.arange(0, N_ROWS), tl.arange(0, BLOCK_K)
    column = sample[None, :].to(tl.int64)
    term_column = column * tl.where(term_stride > 1, 1, 0)
    every = sample >= 0
    total = tl.zeros((BLOCK_B,), tl.float64)
    for index in range(entries):
        entry = table + index * N_FIELDS
        kind, first, count = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
        if kind < 2:
            inputs, weight, start = tl.load(entry + 3), tl.load(entry + 4), tl.load(entry + 5)
            there = r < count
            acc = tl.zeros((N_ROWS, BLOCK_B), tl.float32)
            for begin in range(0, inputs, BLOCK_K):
                now = begin + k
                w = tl.load(
                    weights + weight + now[None, :] * count + r[:, None],
                    there[:, None] & (now < inputs)[None, :],
                    other=0.0,
                )
                a = tl.load(
                    units + (start + now).to(tl.int64)[:, None] * stride + column, (now < inputs)[:, None], other=0.0
                )
                acc = dot(w, a, acc, "ieee")
            acc += tl.load(vectors + tl.load(entry + 6) + r, there, other=0.0)[:, None]
            offset, gate, add = tl.load(entry + 12), tl.load(entry + 13), tl.load(entry + 11)
            if offset >= 0:
                place = (offset + r).to(tl.int64)[:, None] * term_stride + term_column
                acc += tl.load(terms + place, there[:, None], other=0.0)
            if gate >= 0:
                place = (gate + r).to(tl.int64)[:, None] * term_stride + term_column
                acc *= tl.load(terms + place, there[:, None], other=0.0)
            if add >= 0:
                rows = tl.load(adds + add + r, there, other=0)
                acc += tl.load(units + rows.to(tl.int64)[:, None] * stride + column, there[:, None], other=0.0)
            if kind == 0:
                _make_known(acc, entry, units, vectors, stride, r, there, sample, ACTIVATION, ALPHA)
            else:
                to = parameters + column * per_sample + (first + r)[:, None]
                tl.store(to, acc, there[:, None])
        else:
            for i in range(count):
                at = (first + i).to(tl.int64) * stride + sample
                value = tl.load(z + at)
                if kind == 2:
                    given = value.to(tl.float64)
                    if LAW == 5:
                        row = sample.to(tl.int64) * (per_sample // P) + i
                        out, log = spline_values(
                            parameters, row, every, given, BINS, LOW, HIGH, CLIP, MIN_WIDTH, MIN_HEIGHT,
                            MIN_DERIVATIVE, DIVISOR, EXPONENTIAL, TAILS, True, BLOCK_BINS,
                        )  # fmt: skip
                    else:
                        mine = parameters + sample.to(tl.int64) * per_sample + i * P
                        shift = tl.load(mine + (0 if SHIFT_FIRST else 1)).to(tl.float64)
                        if LAW == 4:
                            out = given - shift
                            log = tl.zeros_like(given)
                        else:
                            raw = tl.load(mine + (1 if SHIFT_FIRST else 0)).to(tl.float64)
                            if LAW == 0:
                                log_scale = raw / (1.0 + tl.abs(raw) / FLOOR)
                                scale = tl.exp(log_scale)
                            elif LAW == 3:
                                log_scale = raw
                                scale = tl.exp(raw)
                            else:
                                scale = _softplus(raw) + FLOOR if LAW == 1 else _sigmoid(raw + 2.0) + FLOOR
                                log_scale = tl.log(scale)
                            out = (given - shift) / scale
                            log = -log_scale
                    value = out.to(tl.float32)
                    total += log
                tl.store(x + at, value)
                one = tl.arange(0, 1)
                _make_known(value[None, :], entry, units, vectors, stride, one + i, one == 0, sample, ACTIVATION, ALPHA)
        tl.debug_barrier()  # what one thread of the program stored, others read
    tl.store(log_det + sample, total)


@dataclass(frozen=True)
class Program:
    """What the kernel is given of a transform.

    Attributes:
        table: (entries, 16) int32, see `FIELDS`.
        weights: fp32, those of the entries one after another, each [input][unit].
        vectors: fp32, biases, scales and shifts.
        adds: int32, rows of units that are added.
        dims: D.
        rows: The number of rows of units.
        parameters: The most parameters of a step.
        constants: What the kernel is compiled for.
    """

    table: Tensor
    weights: Tensor
    vectors: Tensor
    adds: Tensor
    dims: int
    rows: int
    parameters: int
    constants: dict[str, Any]


def masked_inverse(program: Program, z: Tensor, terms: Tensor) -> tuple[Tensor, Tensor]:
    """Returns x, (D, N) fp32, and log|det dx/dz|, (N,) fp64, in nats.

    Args:
        program: The transform.
        z: (D, N) fp32, N a multiple of `TILE`, the dimensions in the order in which they become known.
        terms: (rows, N), or (rows, 1) where all samples share them, fp32: what the context adds and multiplies by.

    Raises:
        ArgumentError: A tensor has another shape, dtype or device.
        BackendError: No kernel can run on this device.
    """
    z = check_operand("z", z, (program.dims, -1), torch.float32, program.weights.device)
    N = z.shape[1]
    terms = check_operand("terms", terms, (-1, -1), torch.float32, z.device)
    if not can_launch(z.device):
        raise BackendError(f"masked_inverse: Triton kernels need a CUDA device, these tensors are on {z.device}")
    x, log_det = torch.empty_like(z), torch.empty(N, dtype=torch.float64, device=z.device)
    units = z.new_empty(max(program.rows, 1), N)
    parameters = z.new_empty(N, max(program.parameters, 1))
    tensors = program.weights, program.vectors, program.adds, terms, terms.shape[1], units, parameters, z, x, log_det
    arguments = program.table, len(program.table), *tensors, N, parameters.shape[1]
    constants = {
        **program.constants, "N_FIELDS": len(FIELDS), "N_ROWS": ROWS, "BLOCK_K": 32, "BLOCK_B": TILE
    }  # fmt: skip
    if N:
        with torch.cuda.device_of(z):
            launch(
                Launch(_masked_inverse_kernel, (N // TILE,), arguments, constants, 4, pdl=False, registers=REGISTERS)
            )
    return x, log_det
