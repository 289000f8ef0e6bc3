"""The linear layers of a transformer step, with all that stands around them in one kernel.

    y = epilogue(norm(x) Wᵀ + b)

norm: LayerNorm, x ↦ (x − mean) / √(var + 1e-5) · γ + β over the row, or nothing. epilogue: nothing; exact GELU,
h ↦ h · ½(1 + erf(h/√2)); `add`, to what the output holds (the residual stream); or `qkv`, which leaves the queries in a
buffer and writes the keys and values into the cache. Statistics, sums and epilogues are fp32, the operands of the
product have the dtype of W; fp32 means fp32, unless "tf32" is asked for.

A step of sampling has few rows, so W, read once, is all of its memory traffic, and the time is that of bringing it in:
many small tiles, so that every multiprocessor takes part. Where there are too few tiles, the depth K is split among
several programs, and the last of them adds up their parts, always in the same order. Up to four rows are multiplied
without tensor cores, which would want sixteen.
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

from .launch import DTYPES, Launch, Scratch, arrive, check_operand, dot, launch, launch_dependents, prefetch_lines, wait

NORM_EPS = 1e-5
FEW_ROWS = 4  # that are multiplied without tensor cores
STATISTICS = 4096  # values that a program holds at once to take the statistics of its rows

Norm = tuple[Tensor, Tensor]
"""γ and β of a LayerNorm, (K,) fp32 each."""


@dataclass(frozen=True)
class Tile:
    """What one program computes: a tile of rows × columns, over depth values at a time, by so many warps.

    splits: programs that share the depth. stages: tiles of the operands under way at once.
    """

    rows: int
    columns: int
    depth: int
    splits: int = 1
    warps: int = 4
    stages: int = 3

    def grid(self, rows: int, N: int) -> tuple[int, int, int]:
        return triton.cdiv(N, self.columns), triton.cdiv(rows, self.rows), self.splits

    def scratch(self, rows: int, N: int) -> tuple[int, int]:
        """Values and counters that a `Scratch` must have."""
        across, down, _ = self.grid(rows, N)
        tiles = across * down if self.splits > 1 else 0
        return tiles * self.splits * self.rows * self.columns, tiles


def reference(x: Tensor, weight: Tensor, bias: Tensor, norm: Norm | None = None, gelu: bool = False) -> Tensor:
    """The same by PyTorch, in the dtype of W; the residual is the caller's to add. x: (rows, K). Returns (rows, N)."""
    if norm is not None:
        gamma, beta = norm
        x = F.layer_norm(x, x.shape[-1:], gamma.to(x.dtype), beta.to(x.dtype), NORM_EPS)
    y = F.linear(x.to(weight.dtype), weight, bias.to(weight.dtype))
    return F.gelu(y) if gelu else y


@triton.jit
def _statistics(x, r, rows, K: tl.constexpr, EPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr):
    """mean and 1/√(var + ε) of each row, from chunks of BLOCK_S values, merged (Chan, Golub and LeVeque)."""
    mean = tl.zeros((BLOCK_R,), tl.float32)
    squares = tl.zeros((BLOCK_R,), tl.float32)  # Σ (x − mean)²
    for start in range(0, K, BLOCK_S):
        count = tl.minimum(K - start, BLOCK_S).to(tl.float32)
        k = start + tl.arange(0, BLOCK_S)
        inside = (k < K)[None, :]
        v = tl.load(x + r.to(tl.int64)[:, None] * K + k[None, :], mask=(r < rows)[:, None] & inside, other=0.0)
        chunk_mean = tl.sum(v, 1) / count
        off = tl.where(inside, v - chunk_mean[:, None], 0.0)
        step = chunk_mean - mean
        squares += tl.sum(off * off, 1) + step * step * (start * count / (start + count))
        mean += step * (count / (start + count))
    return mean, tl.rsqrt(squares / K + EPS)


@triton.jit
def _finish(
    acc, r, n, rows, bias, out, keys, values, token, window, T,
    N: tl.constexpr, HEAD: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """Bias, epilogue and store of a tile. acc: (BLOCK_R, BLOCK_N) fp32; token: position of the window's first token."""
    inside = (r < rows)[:, None] & (n < N)[None, :]
    y = acc + tl.load(bias + n, mask=n < N, other=0.0)[None, :]
    if EPILOGUE == "qkv":
        # Column n is (q, k or v; head; channel); row r is (sample, token of the window).
        C: tl.constexpr = N // 3
        part, column = n // C, n % C
        place = ((r // window).to(tl.int64)[:, None] * (C // HEAD) + (column // HEAD)[None, :]) * T
        place = (place + (token + r % window)[:, None]) * HEAD + (column % HEAD)[None, :]  # in (R, H, T, d)
        tl.store(out + r.to(tl.int64)[:, None] * C + column[None, :], y, mask=inside & (part == 0)[None, :])
        tl.store(keys + place, y, mask=inside & (part == 1)[None, :])
        tl.store(values + place, y, mask=inside & (part == 2)[None, :])
    else:
        place = out + r.to(tl.int64)[:, None] * N + n[None, :]
        if EPILOGUE == "gelu":
            y = y * 0.5 * (1.0 + tl.erf(y * 0.7071067811865476))
        if EPILOGUE == "add":
            y += tl.load(place, mask=inside, other=0.0)
        tl.store(place, y, mask=inside)


@triton.jit(do_not_specialize=["offset"])
def _norm_linear_kernel(
    x, weight, bias, gamma, beta, out, keys, values, partial, arrived, position, offset, rows, window, T,
    N: tl.constexpr, K: tl.constexpr, HEAD: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
    EPILOGUE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    SHARE: tl.constexpr = triton.cdiv(triton.cdiv(K, BLOCK_K), SPLITS) * BLOCK_K  # of the depth, for each split
    first = split * SHARE
    last = tl.minimum(first + SHARE, K)
    weight_rows = weight + n.to(tl.int64)[:, None] * K
    if PDL:
        LINE: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth  # values in 128 bytes
        line = first + LINE * tl.arange(0, triton.next_power_of_2(triton.cdiv(SHARE, LINE)))
        mine = (n < N)[:, None] & (line < last)[None, :] & (tl.program_id(1) == 0)
        prefetch_lines(weight_rows + line[None, :], mine)
        launch_dependents()
        wait()
    if NORM:
        mean, inverse = _statistics(x, r, rows, K, EPS, BLOCK_R, BLOCK_S)

    FEW: tl.constexpr = BLOCK_R < 16
    if FEW:  # products stay apart until the end: one sum over the threads instead of one for each tile
        products = tl.zeros((BLOCK_R, BLOCK_N, BLOCK_K), tl.float32)
    else:
        acc = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for start in tl.range(first, last, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        w = tl.load(weight_rows + k[None, :], mask=(n < N)[:, None] & (k < last)[None, :], other=0.0)
        inside = (r < rows)[:, None] & (k < last)[None, :]
        a = tl.load(x + r.to(tl.int64)[:, None] * K + k[None, :], mask=inside, other=0.0)
        if NORM:
            scale = tl.load(gamma + k, mask=k < last, other=0.0)[None, :]
            shift = tl.load(beta + k, mask=k < last, other=0.0)[None, :]
            a = (a - mean[:, None]) * inverse[:, None] * scale + shift
        if FEW:
            products += a.to(tl.float32)[:, None, :] * w.to(tl.float32)[None, :, :]
        else:
            acc = dot(a.to(w.dtype), tl.trans(w), acc, PRECISION)
    if FEW:
        acc = tl.sum(products, 2)

    token = 0
    if EPILOGUE == "qkv":
        token = tl.load(position, cache_modifier=".cg") + offset
    if SPLITS == 1:
        _finish(acc, r, n, rows, bias, out, keys, values, token, window, T, N, HEAD, EPILOGUE)
    else:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        place = tl.arange(0, BLOCK_R)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        parts = partial + tile.to(tl.int64) * (SPLITS * BLOCK_R * BLOCK_N) + place
        tl.store(parts + split * (BLOCK_R * BLOCK_N), acc)
        if arrive(arrived + tile) == SPLITS - 1:  # the last to come
            acc = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
            for part in tl.static_range(SPLITS):
                acc += tl.load(parts + part * (BLOCK_R * BLOCK_N), cache_modifier=".cg")
            tl.store(arrived + tile, 0)
            _finish(acc, r, n, rows, bias, out, keys, values, token, window, T, N, HEAD, EPILOGUE)


def norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    *,
    tile: Tile,
    norm: Norm | None = None,
    epilogue: str = "none",
    scratch: Scratch | None = None,
    precision: str = "ieee",
    pdl: bool = False,
) -> None:
    """out = epilogue(norm(x) Wᵀ + b), or out += norm(x) Wᵀ + b for the epilogue "add".

    x: (rows, K) fp32, or without a norm of any dtype of ours; weight: (N, K); bias: (N,) fp32; out: (rows, N) of any
    dtype, written. epilogue: "none", "gelu" or "add". precision: "ieee" or "tf32", of fp32 products. pdl: see
    `launch.py`. Raises ArgumentError.
    """
    check_choice("epilogue", epilogue, ("none", "gelu", "add"))
    N, K = check_operand("weight", weight, (-1, -1), DTYPES).shape
    rows = check_operand("x", x, (-1, K), torch.float32 if norm else DTYPES, weight.device).shape[0]
    check_operand("out", out, (rows, N), DTYPES, weight.device)
    _launch(x, weight, bias, norm, out, None, None, None, 0, 1, epilogue, tile, scratch, precision, pdl)


def norm_qkv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm: Norm,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    *,
    tile: Tile,
    offset: int = 0,
    window: int = 1,
    scratch: Scratch | None = None,
    precision: str = "ieee",
    pdl: bool = False,
) -> None:
    """(q, k, v) = norm(x) Wᵀ + b, the keys and values of the tokens position + offset … + window − 1 into the cache.

    x: (R·window, C) fp32, row r·window + w is token w of the window of row r; weight: (3C, C), rows ordered (q|k|v,
    head, channel); bias: (3C,) fp32; queries: (R·window, C); keys, values: (R, H, T, d); position: (1,) int32, read on
    the device. queries, keys and values have the dtype of W and are written. Raises ArgumentError.
    """
    N, C = check_operand("weight", weight, (-1, -1), DTYPES).shape
    device, dtype = weight.device, weight.dtype
    R, H, _, d = check_operand("keys", keys, (-1, -1, -1, -1), dtype, device).shape
    if N != 3 * C or H * d != C:
        raise ArgumentError("weight", f"shape {(3 * H * d, H * d)} for heads of {d}", (N, C))
    check_operand("values", values, keys.shape, dtype, device)
    check_operand("x", x, (R * window, C), torch.float32, device)
    check_operand("queries", queries, (R * window, C), dtype, device)
    check_operand("position", position, (1,), torch.int32, device)
    _launch(
        x, weight, bias, norm, queries, keys, values, position, offset, window, "qkv", tile, scratch, precision, pdl
    )


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm: Norm | None,
    out: Tensor,
    keys: Tensor | None,
    values: Tensor | None,
    position: Tensor | None,
    offset: int,
    window: int,
    epilogue: str,
    tile: Tile,
    scratch: Scratch | None,
    precision: str,
    pdl: bool,
) -> None:
    N, K = weight.shape
    check_operand("bias", bias, (N,), torch.float32, weight.device)
    for name, each in zip(("norm[0]", "norm[1]"), norm or (), strict=False):
        check_operand(name, each, (K,), torch.float32, weight.device)
    check_choice("precision", precision, ("ieee", "tf32"))
    rows = x.shape[0]
    scratch = Scratch.fitting(scratch, *tile.scratch(rows, N), weight.device)
    gamma, beta = norm or (None, None)
    T, d = (1, 1) if keys is None else keys.shape[2:]
    arguments = (
        x, weight, bias, gamma, beta, out, keys, values, scratch.partial, scratch.arrived, position, offset, rows,
        window, T,
    )  # fmt: skip
    constants = {
        "N": N,
        "K": K,
        "HEAD": d,
        "NORM": norm is not None,
        "EPS": NORM_EPS,
        "EPILOGUE": epilogue,
        "PRECISION": precision,
        "BLOCK_R": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.depth,
        "BLOCK_S": min(triton.next_power_of_2(K), max(STATISTICS // tile.rows, 32)) if norm else 1,
        "SPLITS": tile.splits,
        "STAGES": tile.stages,
        "PDL": pdl,
    }
    launch(Launch(_norm_linear_kernel, tile.grid(rows, N), arguments, constants, tile.warps, pdl))
