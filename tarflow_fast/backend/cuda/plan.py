"""How the CUDA kernel's work is divided: which block has which tiles, and what shared memory is used for.

Every tile of 16 outputs of a layer belongs to one block. Blocks fetch weights ahead of the work, so a block that has
more than its share in one phase may have fetched it during those before: what counts is that over a token all blocks
fetch about as much.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...engine.shape import BlockShape
from ...errors import BackendError
from .pack import TILE, LinearSize, linear_sizes

MOST_ROWS = 64  # that one launch evaluates at once
MOST_SLOTS = 8  # of the ring
GOOD_SLOTS = 4  # with so many, weights arrive during several phases
LEAST_KEYS = 128  # that are worth a block of their own
MOST_SPLITS = 16
PART_KEYS, SPLIT_KEYS = 64, 16  # what a part of the attention costs beside its keys, and to add it up, in keys


@dataclass(frozen=True)
class Plan:
    """Of a launch, in the kernel's names (see params.h), and the shared memory of a block in bytes."""

    slots: int
    slot_k: int
    staged_rows: int
    splits: int
    least_keys: int
    shared_bytes: int


def whole(n: int, of: int) -> int:
    return -(-n // of) * of


def slot_inputs(shape: BlockShape) -> int:
    """slot_k: all inputs of every layer but fc2."""
    return whole(max(shape.channels, shape.token_dim), TILE)


def grid_blocks(shape: BlockShape, multiprocessors: int) -> int:
    """A block on each multiprocessor, but no more than have something to do in the largest layer."""
    return min(multiprocessors, max(tiles for tiles, _ in linear_sizes(shape)))


def share(sizes: list[LinearSize], blocks: int) -> Tensor:
    """(layers, blocks, 2) int32: first tile and number of tiles of each layer and block.

    In each layer the blocks' numbers differ by one at most; those with one more are those that have the least so far.
    """
    load = torch.zeros(blocks, dtype=torch.int64, device="cpu")
    work = torch.empty(len(sizes), blocks, 2, dtype=torch.int32, device="cpu")
    for layer, (tiles, k_tiles) in enumerate(sizes):
        count = torch.full((blocks,), tiles // blocks, dtype=torch.int64, device="cpu")
        count[load.argsort(stable=True)[: tiles % blocks]] += 1
        load += count * k_tiles
        work[layer, :, 0] = count.cumsum(0) - count
        work[layer, :, 1] = count
    return work


def fetches(sizes: list[LinearSize], work: Tensor, slot_k: int) -> Tensor:
    """(blocks, most, 2) int32: place and number of the 16 × 16 tiles that a block fetches for a token, slot by slot."""
    most_tiles = slot_k // TILE
    jobs: list[list[tuple[int, int]]] = [[] for _ in range(work.shape[1])]
    begin = 0
    for (tiles, k_tiles), of_layer in zip(sizes, work.tolist(), strict=True):
        for block, (first, count) in enumerate(of_layer):
            jobs[block] += [
                (begin + tile * k_tiles + k, min(most_tiles, k_tiles - k))
                for tile in range(first, first + count)
                for k in range(0, k_tiles, most_tiles)
            ]
        begin += tiles * k_tiles
    table = torch.zeros(len(jobs), max(map(len, jobs)), 2, dtype=torch.int32, device="cpu")
    for block, of_block in enumerate(jobs):
        if of_block:
            table[block, : len(of_block)] = torch.tensor(of_block, dtype=torch.int32, device="cpu")
    return table


def choose_splits(pairs: int, tokens: int, blocks: int) -> int:
    """Blocks that share the keys of a row and head: least time where blocks take rounds over all parts."""

    def cost(splits: int) -> int:
        keys = max(-(-tokens // splits), min(LEAST_KEYS, tokens))
        return -(-pairs * splits // blocks) * (keys + PART_KEYS) + splits * SPLIT_KEYS

    return min(range(1, MOST_SPLITS + 1), key=cost)


def make_plan(
    shape: BlockShape,
    dtype: torch.dtype,
    *,
    rows: int,
    most_rows: int,
    warps: int,
    jobs: int,
    blocks: int,
    shared_bytes: int,
) -> Plan:
    """rows: R; most_rows, warps: of the kernel's instance; jobs: the most that a block fetches; shared_bytes: that a
    block can have. Raises BackendError if the model is too wide for it."""
    slot_k, size = slot_inputs(shape), dtype.itemsize
    layers = 4 * shape.layers + 2
    sums = max(most_rows // 8 * warps * 128, whole(warps * (shape.head_dim + 2), 4))
    fixed = whole(4 * MOST_ROWS + 8 * (layers + jobs), 16) + 4 * sums

    def slots(staged_rows: int) -> int:
        return (shared_bytes - fixed - staged_rows * (slot_k + 8) * size) // (slot_k * TILE * size)

    choices = range(whole(rows, 8), 0, -8)
    staged_rows = next((n for n in choices if slots(n) >= GOOD_SLOTS), 8)
    count = min(slots(staged_rows), MOST_SLOTS)
    if count < 1:
        needed = fixed + 8 * (slot_k + 8) * size + slot_k * TILE * size
        raise BackendError(
            f"the CUDA kernel needs {needed} bytes of shared memory for a model of {shape.channels} channels in "
            f"{str(dtype).removeprefix('torch.')}, and a block has {shared_bytes} here; use bfloat16, or "
            "backend='triton'"
        )
    used = fixed + staged_rows * (slot_k + 8) * size + count * slot_k * TILE * size
    splits = choose_splits(rows * shape.heads, shape.tokens, blocks)
    return Plan(count, slot_k, staged_rows, splits, LEAST_KEYS, used)
