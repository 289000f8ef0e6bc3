"""One parallel pass's update of a window of tokens, and how far each of them moved.

    x_{i+1} ← z_{i+1} · exp(xa_i) + xb_i
    change_{i+1} = max_d |new x_{i+1} − old x_{i+1}|
    residual_{i+1} = max_d |forward(old x)_{i+1} − z_{i+1}| = max_d |new x_{i+1} − old x_{i+1}| · exp(−xa_i)

This is done for every token i + 1 of the window at once, from parameters that were computed from the old tokens; with
guidance, see `affine.py`. A token that is not finite has a change and a residual that are not finite either.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .affine import Rule, affine_tokens
from .launch import Launch, check_operand, launch, launch_dependents, wait


@dataclass(frozen=True)
class Tile:
    """The part that one program computes: so many tokens, by so many warps."""

    tokens: int
    warps: int = 4


@triton.jit
def _largest(values, there):
    """Returns the largest value of each row, or NaN if one of them is NaN, which a maximum would pass over."""
    # The LLVM of Triton 3.9 would make a count of integers from bits packed in memory, so floats are counted.
    unordered = tl.sum(tl.where(there & (values != values), 1.0, 0.0), 1) > 0
    return tl.where(unordered, float("nan"), tl.max(tl.where(there, values, 0.0), 1))


@triton.jit
def _fixed_point_update_kernel(
    parameters, z, x, token_log_det, change, residual, guidance, position, samples, window, T,
    D: tl.constexpr, BLOCK_D: tl.constexpr, NVP: tl.constexpr, GUIDE_A: tl.constexpr, GUIDE_B: tl.constexpr,
    BLOCK_T: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)  # (sample, token of the window)
    d = tl.arange(0, BLOCK_D)
    rows = samples * window
    inside = row < rows
    there = inside[:, None] & (d < D)[None, :]
    if PDL:
        launch_dependents()
        wait()
    sample = row // window
    token = tl.load(position, cache_modifier=".cg") + 1 + row % window
    new, log_det, shrink = affine_tokens(
        parameters, z, guidance, row, rows, sample, token, inside, T, D, BLOCK_D, NVP, GUIDE_A, GUIDE_B
    )
    place = sample.to(tl.int64) * T + token
    cell = x + place[:, None] * D + d[None, :]
    moved = tl.abs(new - tl.load(cell, mask=there, other=0.0))
    tl.store(change + row, _largest(moved, there), mask=inside)
    tl.store(residual + row, _largest(moved * shrink, there), mask=inside)
    tl.store(cell, new, mask=there)
    tl.store(token_log_det + place, log_det, mask=inside)


def fixed_point_update(
    parameters: Tensor,
    z: Tensor,
    x: Tensor,
    token_log_det: Tensor,
    change: Tensor,
    residual: Tensor,
    rule: Rule,
    position: Tensor,
    *,
    tile: Tile,
    pdl: bool = False,
) -> None:
    """Update the tokens position + 1 … position + window of x and their log-dets, in place.

    parameters: (branches·B·window, 2D), or (…, D) if volume-preserving, fp32, after the tokens from `position` on; rows
    are ordered (branch, sample, token of the window). z, x: (B, T, D) fp32. token_log_det: (B, T) fp32. change,
    residual: (B, window) fp32, how far the tokens moved, written. position: (1,) int32, read on the device. pdl: see
    `launch.py`. Raises ArgumentError.
    """
    B, window = check_operand("change", change, (-1, -1), torch.float32).shape
    rule.check_tokens(parameters, z, x, token_log_det, window)
    for name, each in (("change", change), ("residual", residual)):
        check_operand(name, each, (z.shape[0], window), torch.float32, z.device)
    check_operand("position", position, (1,), torch.int32, z.device)
    arguments = (parameters, z, x, token_log_det, change, residual, rule.guidance, position, B, window, z.shape[1])
    constants = {**rule.constants(z.shape[2]), "BLOCK_T": tile.tokens, "PDL": pdl}
    grid = (triton.cdiv(B * window, tile.tokens),)
    launch(Launch(_fixed_point_update_kernel, grid, arguments, constants, tile.warps, pdl))
