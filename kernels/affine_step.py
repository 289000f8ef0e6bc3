"""The step between two evaluations of the transformer: from the output after token i to the input of token i + 1.

    x_{i+1} = z_{i+1} · exp(xa_i) + xb_i           with guidance, see `affine.py`
    log-det of token i + 1 = Σ_d xa_i              nats of dx/dz
    h_r = proj_in(x_{i+1}) + position_{i+1} + class_r

All of this is one launch. Every program that makes a tile of h computes the tokens that it needs for itself, from so
few numbers that this costs less than to wait for another kernel; the programs of the first columns store them. `embed`
is the last line alone, for the token that a block begins with and for the windows of the parallel solver.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tarflow_fast.checks import check_choice
from tarflow_fast.errors import ArgumentError

from .affine import Rule, affine_tokens
from .launch import DTYPES, Launch, check_operand, dot, launch, launch_dependents, prefetch_lines, wait


@dataclass(frozen=True)
class Embedding:
    """The first layer of a block.

    weight: (C, D) of any dtype. bias: (C,) fp32. positions: (T, C) fp32. classes: (R, C) fp32, the class embedding of
    each row, or None for a model without classes.
    """

    weight: Tensor
    bias: Tensor
    positions: Tensor
    classes: Tensor | None = None

    def check(self, B: int, T: int, D: int, branches: int) -> None:
        """Raises ArgumentError unless this embeds T tokens of D values, for B samples in so many branches."""
        C = check_operand("embedding.weight", self.weight, (-1, D), DTYPES).shape[0]
        device = self.weight.device
        check_operand("embedding.bias", self.bias, (C,), torch.float32, device)
        check_operand("embedding.positions", self.positions, (T, C), torch.float32, device)
        if self.classes is not None:
            check_operand("embedding.classes", self.classes, (branches * B, C), torch.float32, device)


@dataclass(frozen=True)
class Tile:
    """The part of h that one program computes: samples × columns, by so many warps."""

    samples: int
    columns: int
    warps: int = 4

    def grid(self, samples: int, C: int) -> tuple[int, int]:
        """Returns the programs along each dimension."""
        return triton.cdiv(samples, self.samples), triton.cdiv(C, self.columns)  # CUDA limits the second to 65,535


def reference(x: Tensor, embedding: Embedding, start: int, branches: int) -> Tensor:
    """Returns h by PyTorch, (branches·B·window, C), for the tokens x, (B, window, D), from `start` on."""
    B, window, _ = x.shape
    dtype = embedding.weight.dtype
    h = F.linear(x.to(dtype), embedding.weight, embedding.bias.to(dtype)).to(embedding.bias.dtype)
    h = (h + embedding.positions[start : start + window]).repeat(branches, 1, 1)
    if embedding.classes is not None:
        h = h + embedding.classes[:, None]
    return h.reshape(branches * B * window, -1)


@triton.jit(do_not_specialize=["offset"])
def _affine_step_kernel(
    parameters, z, x, token_log_det, nonfinite, guidance, weight, bias, positions, classes, h, position, offset,
    samples, window, T, C: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, NVP: tl.constexpr,
    GUIDE_A: tl.constexpr, GUIDE_B: tl.constexpr, UPDATE: tl.constexpr, BRANCHES: tl.constexpr,
    CLASSES: tl.constexpr, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)  # (sample, token of the window)
    d = tl.arange(0, BLOCK_D)
    rows = samples * window
    inside = row < rows
    if PDL:
        LINE: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth  # values in 128 bytes
        line = LINE * tl.arange(0, triton.next_power_of_2(triton.cdiv(D, LINE)))
        prefetch_lines(weight + n[:, None] * D + line[None, :], (n < C)[:, None] & (line < D)[None, :])
        launch_dependents()
        wait()
    sample = row // window
    token = tl.load(position, cache_modifier=".cg") + offset + row % window
    there = inside[:, None] & (d < D)[None, :]
    place = x + (sample.to(tl.int64) * T + token)[:, None] * D + d[None, :]
    if UPDATE:
        token += 1
        place += D
        v, log_det, _ = affine_tokens(
            parameters, z, guidance, row, rows, sample, token, inside, T, D, BLOCK_D, NVP, GUIDE_A, GUIDE_B
        )
        if tl.program_id(1) == 0:
            tl.store(place, v, mask=there)
            tl.store(token_log_det + sample.to(tl.int64) * T + token, log_det, mask=inside)
            # The LLVM of Triton 3.9 would make a count of integers from bits packed in memory, so floats are counted.
            bad = tl.sum(tl.where(there & ~(tl.abs(v) < float("inf")), 1.0, 0.0), 1) > 0
            tl.store(nonfinite + sample, token, mask=inside & bad & (token < tl.load(nonfinite + sample, mask=inside)))
    else:
        v = tl.load(place, mask=there, other=0.0)

    w = tl.load(weight + n[:, None] * D + d[None, :], mask=(n < C)[:, None] & (d < D)[None, :], other=0.0)
    v = tl.where(there, v, 0.0).to(w.dtype)
    if BLOCK_B < 16:  # tensor cores take no fewer than 16 rows
        acc = tl.sum(v.to(tl.float32)[:, None, :] * w.to(tl.float32)[None, :, :], 2)
    else:
        acc = dot(v, tl.trans(w), tl.zeros((BLOCK_B, BLOCK_N), tl.float32), PRECISION)
    whole = inside[:, None] & (n < C)[None, :]
    acc += tl.load(bias + n, mask=n < C, other=0.0)[None, :]
    acc += tl.load(positions + token.to(tl.int64)[:, None] * C + n[None, :], mask=whole, other=0.0)
    for branch in tl.static_range(BRANCHES):
        y = acc
        if CLASSES:
            y += tl.load(classes + (branch * samples + sample)[:, None] * C + n[None, :], mask=whole, other=0.0)
        tl.store(h + (branch * rows + row).to(tl.int64)[:, None] * C + n[None, :], y, mask=whole)


def affine_step(
    parameters: Tensor,
    z: Tensor,
    x: Tensor,
    token_log_det: Tensor,
    nonfinite: Tensor,
    rule: Rule,
    embedding: Embedding,
    h: Tensor,
    position: Tensor,
    *,
    tile: Tile,
    offset: int = 0,
    precision: str = "ieee",
    pdl: bool = False,
) -> None:
    """Make token i + 1 in x, its log-det in token_log_det, and its embedding in h, where i = position + offset.

    parameters: (branches·B, 2D), or (…, D) if volume-preserving, fp32, the unguided branch in the second half. z, x:
    (B, T, D) fp32. token_log_det: (B, T) fp32. nonfinite: (B,) int32, which becomes i + 1 where that token has an
    infinity or NaN, unless it is lower already. h: (branches·B, C) fp32. position: (1,) int32, read on the device.
    precision: "ieee" or "tf32", for products of fp32. pdl: see `launch.py`. Raises ArgumentError.
    """
    rule.check_tokens(parameters, z, x, token_log_det, 1)
    check_operand("nonfinite", nonfinite, (z.shape[0],), torch.int32, z.device)
    _launch(parameters, z, x, token_log_det, nonfinite, rule, embedding, h, position, offset, 1, tile, precision, pdl)


def embed(
    x: Tensor,
    embedding: Embedding,
    h: Tensor,
    position: Tensor,
    *,
    tile: Tile,
    branches: int = 1,
    offset: int = 0,
    window: int = 1,
    precision: str = "ieee",
    pdl: bool = False,
) -> None:
    """Put the embeddings of the tokens position + offset … position + offset + window − 1 into h.

    x: (B, T, D) fp32, the same tokens for both branches. h: (branches·B·window, C) fp32, whose rows are ordered
    (branch, sample, token). position: (1,) int32, read on the device. precision, pdl: see `affine_step`. Raises
    ArgumentError.
    """
    _launch(None, None, x, None, None, Rule(), embedding, h, position, offset, window, tile, precision, pdl, branches)


def _launch(
    parameters: Tensor | None,
    z: Tensor | None,
    x: Tensor,
    token_log_det: Tensor | None,
    nonfinite: Tensor | None,
    rule: Rule,
    embedding: Embedding,
    h: Tensor,
    position: Tensor,
    offset: int,
    window: int,
    tile: Tile,
    precision: str,
    pdl: bool,
    branches: int | None = None,
) -> None:
    branches = branches or rule.branches
    B, T, D = check_operand("x", x, (-1, -1, -1), torch.float32, embedding.weight.device).shape
    embedding.check(B, T, D, branches)
    if not 1 <= window <= T:
        raise ArgumentError("window", f"an integer from 1 to T = {T}", window)
    C = embedding.weight.shape[0]
    check_operand("h", h, (branches * B * window, C), torch.float32, x.device)
    check_operand("position", position, (1,), torch.int32, x.device)
    check_choice("precision", precision, ("ieee", "tf32"))
    arguments = (
        parameters, z, x, token_log_det, nonfinite, rule.guidance, embedding.weight, embedding.bias,
        embedding.positions, embedding.classes, h, position, offset, B, window, T,
    )  # fmt: skip
    constants = {
        "C": C,
        **rule.constants(D),
        "UPDATE": parameters is not None,
        "BRANCHES": branches,
        "CLASSES": embedding.classes is not None,
        "PRECISION": precision,
        "BLOCK_B": tile.samples,
        "BLOCK_N": tile.columns,
        "PDL": pdl,
    }
    launch(Launch(_affine_step_kernel, tile.grid(B * window, C), arguments, constants, tile.warps, pdl))
