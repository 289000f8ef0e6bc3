"""The tiles that the Triton kernels work in: candidates for a shape, and the choice among them by measurement.

A kernel timed alone, with cold or warm caches, is not the kernel that runs: in a step every kernel is followed at once
by the next, whose weights are already on their way. So the whole chain of a step is timed, with the tile of one
operation changed at a time. The choice is kept on disk, for each device, shape and version.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import triton

from ...cache import cache_path, read_json, write_json
from ...checks import short
from ...errors import OutOfMemoryError
from ...kernels import affine_step, cached_attention, fixed_point_update, norm_linear
from ...kernels.launch import padded

LEAST_SHARED = 99 * 1024  # bytes of shared memory that a program can have on any GPU, those of 8.6, 8.9 and 12.0
FORMAT = 2  # version of the files on disk, raised whenever kernels or candidates change their meaning


@dataclass(frozen=True)
class PassShape:
    """The sizes that the tiles of a pass depend on."""

    rows: int  # R · window, rows of the linear layers
    pairs: int  # R · heads
    samples: int  # B · window
    window: int
    tokens: int  # T
    channels: int  # C
    hidden: int  # width of the MLP
    token_dim: int  # D
    out_dim: int  # 2D, or D where tokens are only shifted
    head_dim: int
    dtype: torch.dtype
    multiprocessors: int


@dataclass(frozen=True)
class Plan:
    """The tile of each operation of a pass."""

    attention: cached_attention.Tile
    qkv: norm_linear.Tile
    fc1: norm_linear.Tile
    fc2: norm_linear.Tile
    proj: norm_linear.Tile
    proj_out: norm_linear.Tile
    step: affine_step.Tile
    update: fixed_point_update.Tile

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, dict[str, int]]) -> Plan:
        return cls(**{field.name: _TILES[field.name](**values[field.name]) for field in fields(cls)})


_TILES: dict[str, Any] = {
    "attention": cached_attention.Tile,
    **dict.fromkeys(("qkv", "fc1", "fc2", "proj", "proj_out"), norm_linear.Tile),
    "step": affine_step.Tile,
    "update": fixed_point_update.Tile,
}

Candidates = dict[str, list[Any]]
"""The tiles that each operation may have, by its name; the first is the one to begin with."""


def _power_of_two(n: float) -> int:
    """Returns the largest power of two that is not above n, at least 1."""
    return 1 << max(int(n).bit_length() - 1, 0)


def linear_tiles(
    rows: int, N: int, K: int, dtype: torch.dtype, multiprocessors: int, *, norm: bool = False
) -> list[norm_linear.Tile]:
    """Returns the tiles to choose from for a product of (rows, K) by (N, K)ᵀ, after a norm or not."""
    Tile = norm_linear.Tile
    full = dtype == torch.float32  # products in full precision hold their operands in registers
    tiles = []
    if rows <= norm_linear.FEW_ROWS:
        r = triton.next_power_of_2(rows)
        few = [(4, 512), (8, 512), (16, 256), (2, 1024), *([(8, 256)] if r > 1 else [])]
        tiles += [Tile(r, c, k) for c, k in few if r * c * k <= 8192 and k <= max(padded(K), 128)]
    if rows <= 16:
        sizes = [(16, 32, 32, 4), (16, 64, 32, 4)] if full else [(16, 32, 128, 4), (16, 16, 256, 4)]
    elif rows <= 32:
        sizes = [(16, 32, 32, 4), (32, 32, 32, 4)] if full else [(32, 32, 128, 4), (32, 64, 128, 4), (16, 64, 128, 4)]
    elif rows <= 64:
        sizes = [(32, 32, 32, 4), (32, 64, 32, 4)] if full else [(64, 32, 128, 4), (64, 64, 64, 4), (32, 64, 128, 4)]
    elif full:
        sizes = [(64, 64, 32, 8), (32, 64, 32, 4), (64, 32, 32, 4)]
    elif rows <= 512:
        sizes = [(64, 64, 64, 4), (128, 64, 64, 8), (64, 128, 64, 8), (128, 128, 64, 8)]
    else:
        sizes = [(128, 128, 64, 8), (128, 64, 64, 8), (64, 128, 64, 8)]
    if norm:  # a norm needs registers of its own
        sizes = [size for size in sizes if size[:2] not in ((128, 128), (32, 32 if full else 0))]
    widest = max(padded(N), min(size[1] for size in sizes))
    sizes = [size for size in sizes if size[1] <= widest]
    for r, c, k, warps in sizes:
        k = min(k, padded(K))
        tile = Tile(r, c, k, warps=warps, stages=2 if full else 3)
        across, down, _ = tile.grid(rows, N)
        most = _power_of_two(min(1.5 * multiprocessors / (across * down), K / k, 8))
        if r * c >= 128 * 128:  # such a tile leaves no registers for a split
            most = 1
        tiles += [replace(tile, splits=splits) for splits in sorted({most, max(most // 2, 1)}, reverse=True)]
    return tiles


def attention_tiles(shape: PassShape) -> list[cached_attention.Tile]:
    """Returns the tiles to choose from for the attention of a pass of this shape."""
    Tile = cached_attention.Tile
    full, d = shape.dtype == torch.float32, padded(shape.head_dim)
    if shape.window == 1:
        most = min(1024 // d, 16)  # tokens for each warp, as more do not fit in its registers
        sizes = [(1, max(t, 1), warps) for t, warps in ((2 * most, 4), (4 * most, 4), (2 * most, 2), (most, 2))]
    elif shape.window <= 16 or full:
        sizes = [(16, 32 if d <= 64 else 16, 4)] if full else [(16, 64, 4), (16, 32, 4)]
    else:
        sizes = [(64, 32, 8), (16, 64, 4), *([(128, 64, 8)] if d <= 64 else [])]
    tiles = []
    for window, tokens, warps in sizes:
        programs = shape.pairs * -(-shape.window // window)
        most = _power_of_two(min(4 * shape.multiprocessors / programs, shape.tokens / tokens, 32))
        for splits in sorted({most, max(most // 2, 1)}, reverse=True):
            tiles.append(Tile(window, tokens, splits, warps))
        if shape.window == 1:  # a wider window's tiles are never timed
            deeper = (Tile(window, tokens, most, warps, stages) for stages in (3, 4))
            tiles += [tile for tile in deeper if tile.shared_bytes(shape.head_dim, shape.dtype) <= LEAST_SHARED]
    return tiles


def candidates(shape: PassShape) -> Candidates:
    """Returns the tiles to choose from for every operation of a pass of this shape."""
    C = shape.channels

    def linear(N: int, K: int, norm: bool = False) -> list[norm_linear.Tile]:
        return linear_tiles(shape.rows, N, K, shape.dtype, shape.multiprocessors, norm=norm)

    d = padded(shape.token_dim)
    if shape.samples < 16:
        samples = triton.next_power_of_2(shape.samples)
        columns = [max(_power_of_two(n / (samples * d)), 1) for n in (4096, 8192, 16384)]
        steps = [affine_step.Tile(samples, c) for c in dict.fromkeys(min(c, 64) for c in columns)]
    else:
        most = 32 if shape.dtype == torch.float32 or d > 256 else 64
        steps = [affine_step.Tile(16, c, warps=8 if d >= 256 else 4) for c in (32, 16, most)]
    return {
        "attention": attention_tiles(shape),
        "qkv": linear(3 * C, C, norm=True),
        "fc1": linear(shape.hidden, C, norm=True),
        "fc2": linear(C, shape.hidden),
        "proj": linear(C, C),
        "proj_out": linear(shape.out_dim, C),
        "step": list(dict.fromkeys(steps)),
        "update": [fixed_point_update.Tile(max(_power_of_two(1024 / d), 1))],
    }


def first(among: Candidates) -> Plan:
    """Returns the plan that takes the first candidate of every operation."""
    return Plan(**{name: tiles[0] for name, tiles in among.items()})


def interpreted(shape: PassShape) -> Plan:
    """Returns a plan of as few programs as can be, since each takes milliseconds in the interpreter."""
    C = padded(shape.channels)
    linear = norm_linear.Tile(16, max(4 * C, padded(shape.hidden)), C)
    window = 1 if shape.window == 1 else max(16, padded(shape.window))
    return Plan(
        attention=cached_attention.Tile(window, padded(shape.tokens)),
        step=affine_step.Tile(16, C),
        update=fixed_point_update.Tile(16),
        **dict.fromkeys(("qkv", "fc1", "fc2", "proj", "proj_out"), linear),
    )


def tune(among: Candidates, seconds: Callable[[Plan], float | None]) -> Plan:
    """Returns the plan whose step is quickest.

    Each operation is chosen in turn, given the choices before it.

    seconds: a function that returns what a step takes under a plan, or None if that plan cannot run on this device.
    Raises OutOfMemoryError if no plan can.
    """
    best = first(among)
    least = seconds(best)
    for name, tiles in among.items():
        for tile in tiles:
            plan = replace(best, **{name: tile})
            taken = None if plan == best else seconds(plan)
            if taken is not None and (least is None or taken < least):
                best, least = plan, taken
    if least is None:
        raise OutOfMemoryError("backend 'triton': no choice of tiles fits this GPU's shared memory")
    return best


def _path(shape: PassShape, device: dict[str, Any]) -> Path:
    """Returns the file of a choice. device: everything beside the shape that a choice depends on."""
    return cache_path("tiles", {"format": FORMAT, **asdict(shape), "dtype": short(shape.dtype), **device})


def read(shape: PassShape, device: dict[str, Any]) -> Plan | None:
    """Returns the plan that was kept before, or None.

    A file that cannot be understood counts as none, and will be replaced.
    """
    try:
        return Plan.from_dict(read_json(_path(shape, device))["plan"])
    except (ValueError, KeyError, TypeError):
        return None


def write(shape: PassShape, device: dict[str, Any], plan: Plan) -> None:
    """Keep a plan on disk.

    It is written all at once, so that another process never reads half of it. Raises OSError.
    """
    content = {"shape": {**asdict(shape), "dtype": short(shape.dtype)}, "device": device, "plan": plan.to_dict()}
    write_json(_path(shape, device), content)
