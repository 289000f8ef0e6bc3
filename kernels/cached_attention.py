"""Attention of a window of new tokens against the KV cache.

    a_w = Σ_t softmax_t(s_r q_w · k_t) v_t      over the tokens t ≤ position + w

holds for w = 0 … W − 1, in each row r and head. W = 1 is a decoding step, W = T the whole sequence. The keys and values
of the window itself are in the cache already. s_r = 1/(√d · temperature) is a number for each row, because the two
branches of guidance differ in it. The position is read on the device, so that a CUDA graph can be replayed further on.

Softmax is computed online and in fp32: the sums so far are scaled down whenever a larger logit turns up. A decoding
step is bound by reading the cache. Each of the BLOCK_T tokens that a program looks at together therefore keeps a
softmax of its own, over the tokens t, t + BLOCK_T, …, and these are merged once, at the end. So no thread waits for
another in the loop. Wider windows go through tensor cores. Where rows and heads are too few to occupy the GPU, the
tokens are split among several programs, and the last one merges their parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tarflow_fast.checks import check_choice, check_count
from tarflow_fast.errors import ArgumentError

from .launch import (
    DTYPES,
    Launch,
    Scratch,
    arrive,
    check_operand,
    dot,
    launch,
    launch_dependents,
    padded,
    prefetch_lines,
    wait,
)

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e38)  # a running maximum starts here, finite so that no difference is ∞ − ∞
PREFETCHED = 128  # tokens of the cache that a program asks for before it waits


@dataclass(frozen=True)
class Tile:
    """The part that one program computes: queries of one row and head, against some tokens at a time.

    window: the number of queries. tokens: the number of tokens at a time. splits: the number of programs that share the
    tokens. warps: the number of warps of a program. stages: how many tiles of keys and values are under way at once.
    """

    window: int = 1
    tokens: int = 64
    splits: int = 1
    warps: int = 4
    stages: int = 2

    def grid(self, rows: int, heads: int, window: int) -> tuple[int, int, int]:
        """Returns the programs along each dimension."""
        return rows * heads, triton.cdiv(window, self.window), self.splits

    def shared_bytes(self, head_dim: int, dtype: torch.dtype) -> int:
        """Returns the bytes of shared memory for the tiles of keys and values that are under way."""
        return (self.stages - 1) * 2 * self.tokens * padded(head_dim) * dtype.itemsize

    def scratch(self, rows: int, heads: int, window: int, head_dim: int) -> tuple[int, int]:
        """Returns the numbers of values and of counters that a `Scratch` must have."""
        pairs, down, _ = self.grid(rows, heads, window)
        tiles = pairs * down if self.splits > 1 else 0
        return tiles * self.splits * self.window * (padded(head_dim) + 2), tiles


def reference(queries: Tensor, keys: Tensor, values: Tensor, scale: Tensor, position: int, window: int) -> Tensor:
    """Returns the same by PyTorch, in the operands' dtype.

    Shapes are as in `cached_attention`.

    position: the position plus the offset, as a number.
    """
    R, H, _, d = keys.shape
    seen = position + window
    q = queries.view(R, window, H, d).transpose(1, 2)
    logits = (q @ keys[:, :, :seen].transpose(-1, -2)) * scale.view(R, 1, 1, 1)
    future = torch.ones(window, seen, dtype=torch.bool, device=q.device).triu(position + 1)
    p = logits.masked_fill(future, -torch.inf).softmax(-1).to(values.dtype)
    return (p @ values[:, :, :seen]).transpose(1, 2).reshape(R * window, H * d)


@triton.jit
def _one_query(
    queries, keys, values, row, cached, scale, first, last,
    C: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Returns one query's maximum (1,), Σ e (1,) and Σ e v (1, BLOCK_D) over the tokens [first, last), to base 2."""
    channel = tl.arange(0, BLOCK_D)
    q = tl.load(queries + row.to(tl.int64) * C + channel, mask=channel < HEAD, other=0.0).to(tl.float32)
    q *= scale * LOG2_E
    highest = tl.full((BLOCK_T,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for start in tl.range(first, last, BLOCK_T, num_stages=STAGES):
        t = start + tl.arange(0, BLOCK_T)
        place = cached + t.to(tl.int64)[:, None] * HEAD + channel[None, :]
        inside = (t < last)[:, None] & (channel < HEAD)[None, :]
        k = tl.load(keys + place, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(values + place, mask=inside, other=0.0).to(tl.float32)
        logit = tl.where(t < last, tl.sum(k * q[None, :], 1), float("-inf"))
        higher = tl.maximum(highest, logit)
        p = tl.exp2(logit - higher)
        fade = tl.exp2(highest - higher)
        total = total * fade + p
        acc = acc * fade[:, None] + p[:, None] * v
        highest = higher
    top = tl.max(highest, 0)
    weight = tl.exp2(highest - top)
    total = tl.sum(total * weight, 0)
    one = tl.full((1,), 1.0, tl.float32)
    return top * one, total * one, tl.sum(acc * weight[:, None], 0)[None, :]


@triton.jit
def _many_queries(
    queries, keys, values, row, token, inside_window, cached, scale, first, last, C: tl.constexpr, HEAD: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Returns the same for BLOCK_W queries, each over the tokens up to its own.

    Their shapes are (BLOCK_W,) twice and (BLOCK_W, BLOCK_D).
    """
    channel = tl.arange(0, BLOCK_D)
    real = (channel < HEAD)[None, :]
    q = tl.load(
        queries + row.to(tl.int64)[:, None] * C + channel[None, :], mask=inside_window[:, None] & real, other=0.0
    )
    highest = tl.full((BLOCK_W,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_W,), tl.float32)
    acc = tl.zeros((BLOCK_W, BLOCK_D), tl.float32)
    for start in tl.range(first, last, BLOCK_T, num_stages=STAGES):
        t = start + tl.arange(0, BLOCK_T)
        place = cached + t.to(tl.int64)[:, None] * HEAD + channel[None, :]
        inside = (t < last)[:, None] & real
        k = tl.load(keys + place, mask=inside, other=0.0)
        v = tl.load(values + place, mask=inside, other=0.0)
        # A later token of the window may be infinite or NaN. Its weight is 0 for the earlier queries, but 0 · NaN is
        # NaN. So such values are left out of the product, and the weights of queries that do see them become NaN.
        wide = v.to(tl.float32)  # the interpreter keeps bfloat16 as integers
        bad = tl.sum(tl.where(wide - wide == 0, 0, 1), 1) > 0
        v = tl.where(bad[:, None], 0.0, v).to(v.dtype)
        logit = dot(q, tl.trans(k), tl.zeros((BLOCK_W, BLOCK_T), tl.float32), PRECISION) * (scale * LOG2_E)
        logit = tl.where(bad[None, :], float("nan"), logit)
        logit = tl.where((t[None, :] <= token[:, None]) & (t < last)[None, :], logit, float("-inf"))
        higher = tl.maximum(highest, tl.max(logit, 1))
        p = tl.exp2(logit - higher[:, None])
        fade = tl.exp2(highest - higher)
        total = total * fade + tl.sum(p, 1)
        acc = dot(p.to(v.dtype), v, acc * fade[:, None], PRECISION)
        highest = higher
    return highest, total, acc


@triton.jit(do_not_specialize=["offset"])
def _cached_attention_kernel(
    queries, keys, values, out, scale, partial, arrived, position, offset, window, T,
    H: tl.constexpr, HEAD: tl.constexpr, PRECISION: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = H * HEAD
    pair = tl.program_id(0)  # (row, head)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    split = tl.program_id(2)
    row, head = pair // H, pair % H
    cached = pair.to(tl.int64) * T * HEAD  # where the tokens of this row and head begin in the cache
    if PDL:
        # The position that old tokens are asked for by may be stale, but a prefetch is a hint, and L2 is coherent.
        line = tl.arange(0, PREFETCH)
        near = tl.minimum(tl.load(position, cache_modifier=".cg") + offset, T)
        t = near * split // SPLITS + line
        prefetch_lines(keys + cached + t.to(tl.int64) * HEAD, t < near)
        prefetch_lines(values + cached + t.to(tl.int64) * HEAD, t < near)
        launch_dependents()
        wait()
    token = tl.load(position, cache_modifier=".cg") + offset + w  # the token of each query
    seen = tl.load(position, cache_modifier=".cg") + offset + tl.minimum((tl.program_id(1) + 1) * BLOCK_W, window)
    share = tl.cdiv(tl.cdiv(seen, BLOCK_T), SPLITS) * BLOCK_T
    first = split * share
    last = tl.minimum(first + share, seen)
    queries += head * HEAD
    s = tl.load(scale + row)
    if BLOCK_W == 1:
        query = row * window + tl.program_id(1)
        highest, total, acc = _one_query(
            queries, keys, values, query, cached, s, first, last, C, HEAD, BLOCK_D, BLOCK_T, STAGES
        )
    else:
        highest, total, acc = _many_queries(
            queries, keys, values, row * window + w, token, w < window, cached, s, first, last,
            C, HEAD, BLOCK_W, BLOCK_D, BLOCK_T, STAGES, PRECISION,
        )  # fmt: skip

    channel = tl.arange(0, BLOCK_D)
    place = out + (row * window + w).to(tl.int64)[:, None] * C + (head * HEAD + channel)[None, :]
    inside = (w < window)[:, None] & (channel < HEAD)[None, :]
    if SPLITS == 1:
        tl.store(place, acc / total[:, None], mask=inside)
    else:
        tile = pair * tl.num_programs(1) + tl.program_id(1)
        PART: tl.constexpr = BLOCK_W * (BLOCK_D + 2)  # acc, then maxima, then totals
        parts = partial + tile.to(tl.int64) * (SPLITS * PART)
        query = tl.arange(0, BLOCK_W)
        cell = query[:, None] * BLOCK_D + channel[None, :]
        tl.store(parts + split * PART + cell, acc)
        tl.store(parts + split * PART + BLOCK_W * BLOCK_D + query, highest)
        tl.store(parts + split * PART + BLOCK_W * BLOCK_D + BLOCK_W + query, total)
        if arrive(arrived + tile) == SPLITS - 1:  # this program is the last to come
            highest = tl.full((BLOCK_W,), LOWEST, tl.float32)
            total = tl.zeros((BLOCK_W,), tl.float32)
            acc = tl.zeros((BLOCK_W, BLOCK_D), tl.float32)
            for part in range(SPLITS):
                theirs = parts + part * PART
                peak = tl.load(theirs + BLOCK_W * BLOCK_D + query, cache_modifier=".cg")
                higher = tl.maximum(highest, peak)
                fade, grow = tl.exp2(highest - higher), tl.exp2(peak - higher)
                sums = tl.load(theirs + BLOCK_W * BLOCK_D + BLOCK_W + query, cache_modifier=".cg")
                total = total * fade + sums * grow
                acc = acc * fade[:, None] + tl.load(theirs + cell, cache_modifier=".cg") * grow[:, None]
                highest = higher
            tl.store(arrived + tile, 0)
            tl.store(place, acc / total[:, None], mask=inside)


def cached_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    scale: Tensor,
    position: Tensor,
    *,
    tile: Tile,
    offset: int = 0,
    window: int = 1,
    scratch: Scratch | None = None,
    precision: str = "ieee",
    pdl: bool = False,
) -> None:
    """Attend with the queries of the tokens from position + offset on to the cache up to each of them, into `out`.

    queries, out: (R·window, C), C = H·d, where row r·window + w is token w of the window of row r. keys, values: (R, H,
    T, d). All of these have one dtype. scale: (R,) fp32, 1/(√d · temperature). position: (1,) int32, read on the
    device. scratch: memory for splits, default allocated. precision: "ieee" or "tf32", for products of fp32. pdl: see
    `launch.py`. Only `out` is written, and scratch. Raises ArgumentError.
    """
    device, dtype = keys.device, keys.dtype
    R, H, T, d = check_operand("keys", keys, (-1, -1, -1, -1), DTYPES).shape
    check_operand("values", values, keys.shape, dtype, device)
    check_count("window", window)
    if window > T:
        raise ArgumentError("window", f"an integer <= T = {T}", window)
    check_operand("queries", queries, (R * window, H * d), dtype, device)
    check_operand("out", out, (R * window, H * d), dtype, device)
    check_operand("scale", scale, (R,), torch.float32, device)
    check_operand("position", position, (1,), torch.int32, device)
    check_choice("precision", precision, ("ieee", "tf32"))
    if 1 < tile.window < 16:
        raise ArgumentError("tile", "a window of 1, or of 16 or more for tensor cores", tile)
    scratch = Scratch.fitting(scratch, *tile.scratch(R, H, window, d), device)
    arguments = (queries, keys, values, out, scale, scratch.partial, scratch.arrived, position, offset, window, T)
    constants = {
        "H": H,
        "HEAD": d,
        "PRECISION": precision,
        "BLOCK_W": tile.window,
        "BLOCK_D": padded(d),
        "BLOCK_T": tile.tokens,
        "SPLITS": tile.splits,
        "STAGES": tile.stages,
        "PREFETCH": PREFETCHED,
        "PDL": pdl,
    }
    launch(Launch(_cached_attention_kernel, tile.grid(R, H, window), arguments, constants, tile.warps, pdl))
