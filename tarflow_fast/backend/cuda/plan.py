"""The division of the CUDA kernel's work: which block has which tiles, and how shared memory is used.

Every tile of 16 outputs of a layer belongs to one block; but of proj and fc2, which have few of them for all blocks,
a tile has a block for each of several parts of its inputs. Blocks fetch weights ahead of the work, so a block that has
more than its share in one phase may have fetched it during the phases before. What counts is that over a whole token
all blocks fetch about as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from ...engine.shape import BlockShape
from ...errors import BackendError
from .pack import TILE, LinearSize, linear_sizes

MOST_ROWS = 64  # rows that one launch evaluates at once
MOST_SLOTS = 8  # slots of the ring of weights
GOOD_SLOTS = 4  # enough slots for weights to arrive during several phases
LEAST_KEYS = 128  # keys that are worth a block of their own
MOST_SPLITS = 16
MERGED_ROWS = 4  # rows whose parts of the attention each block adds up for itself; those of more take a step
NORMED_ROWS = 16  # rows that each block normalises for itself; those of more take a step, in instances of their own
GROUP_ROWS = 32  # rows of a group, for which a tile of outputs is a unit of work
MOST_HALVINGS = {NORMED_ROWS: 1, GROUP_ROWS: 3, MOST_ROWS: 2}  # of the inputs of proj and fc2, for at most so many rows
LEAST_K_TILES = 8  # tiles of inputs that are worth a block of their own: one for each warp, or three with two groups
GATES_BYTES = 16  # of shared memory that a slot takes besides, of more than NORMED_ROWS rows
TILE_ROWS = 32  # positions of a sample that attend together, see window.cuh
WINDOW_HEAD, WINDOW_ROW = 64, 72  # the head_dim that this is for, and what a row takes of shared memory, in floats
PART_KEYS, SPLIT_KEYS = 64, 16  # the fixed cost of a part of the attention, and of adding it up, in keys


@dataclass(frozen=True)
class Division:
    """The division of the linear layers among blocks, of all launches of so many rows as MOST_HALVINGS tells apart.

    work, jobs: see `share` and `fetches`. most_tiles: the most tiles of any block. pairs: whether blocks 2 i and
    2 i + 1 have the same tiles, for a group of rows each.
    """

    work: Tensor
    jobs: Tensor
    most_tiles: int
    pairs: bool

    @property
    def blocks(self) -> int:
        return self.work.shape[1]


@dataclass(frozen=True)
class Plan:
    """The division of a launch, in the kernel's names (see params.h).

    shared_bytes: the shared memory that a block takes, in bytes.
    """

    slots: int
    slot_k: int
    sums_in_slots: bool
    group_rows: int
    staged_rows: int
    staged_k: int
    tiles: int
    bias_tiles: int
    proj_halvings: int
    fc2_halvings: int
    merges: bool
    splits: int
    least_keys: int
    room: int
    shared_bytes: int


def whole(n: int, of: int) -> int:
    """Returns n rounded up to a whole multiple."""
    return -(-n // of) * of


def slot_inputs(shape: BlockShape) -> int:
    """Returns slot_k: all inputs of every layer but fc2, which takes several slots."""
    return whole(max(shape.channels, shape.token_dim), TILE)


def grid_blocks(shape: BlockShape, multiprocessors: int) -> int:
    """Returns one block for each multiprocessor, but no more blocks than have something to do in the largest layer."""
    return min(multiprocessors, max(size.tiles for size in linear_sizes(shape)))


def most_of_division(rows: int) -> int:
    """Returns the most rows that a launch is divided for in the same way as one of so many."""
    return next(most for most in MOST_HALVINGS if rows <= most)


def divide(shape: BlockShape, rows: int) -> list[LinearSize]:
    """Returns the sizes of the packed layers, with the parts of the inputs of proj and fc2 that blocks share, and the
    groups of rows.

    The parts are added up by whoever reads the residual stream: by every block, where rows are few, and else once. They
    depend on the grid in nothing, so that a pass gives the same bits for any.
    """
    most = MOST_HALVINGS[most_of_division(rows)]
    groups = -(-rows // GROUP_ROWS)
    least = LEAST_K_TILES if groups == 1 else 3 * LEAST_K_TILES

    def halved(size: LinearSize) -> LinearSize:
        return size._replace(halvings=max(n for n in range(most + 1) if n == 0 or size.k_tiles >> n >= least))

    sizes = [size._replace(groups=groups) for size in linear_sizes(shape)]
    return [halved(size) if i % 4 in (2, 0) and 0 < i < len(sizes) - 1 else size for i, size in enumerate(sizes)]


def share(sizes: list[LinearSize], blocks: int) -> Tensor:
    """Returns the first unit and the number of units of each layer and block, (layers, blocks, 2) int32.

    A unit is a tile of outputs, and a part of its inputs for a group of rows (see LinearSize): all tiles of the first
    part, then of the second. Blocks are divided among parts, as one that has several tiles of a part reads its inputs
    once. Of the blocks of a part only so many have tiles as it takes for the most tiles of any to be the fewest: the
    others would read all inputs and make nobody's work less. Those with tiles, and with one more, have the least work
    so far.
    """
    load = torch.zeros(blocks, dtype=torch.int64, device="cpu")
    work = torch.zeros(len(sizes), blocks, 2, dtype=torch.int32, device="cpu")
    for layer, size in enumerate(sizes):
        order = load.argsort(stable=True)
        parts = size.parts
        groups = [order] if blocks < parts else [order[part::parts] for part in range(parts)]
        units = size.tiles * parts // len(groups)
        for part, group in enumerate(groups):
            group = group[: -(-units // -(-units // len(group)))]  # the others would make no block's work less
            count = torch.full((blocks,), 0, dtype=torch.int64, device="cpu")
            count[group] = units // len(group)
            count[group[: units % len(group)]] += 1
            work[layer, group, 0] = (part * units + count.cumsum(0) - count)[group].int()
            work[layer, group, 1] = count[group].int()
        load += work[layer, :, 1] * size.k_tiles >> size.halvings
    return work


def share_pairs(sizes: list[LinearSize], blocks: int) -> Tensor:
    """Returns the same as `share`, for two groups of rows and an even number of blocks.

    Of a pair, 2 i and 2 i + 1, each block has the same tiles as the other, for the first group of rows and for the
    second.
    """
    of_group = [size._replace(groups=1) for size in sizes]
    work = share(of_group, blocks // 2).repeat_interleave(2, dim=1)
    for layer, size in enumerate(of_group):
        second = work[layer, 1::2]
        second[:, 0] += size.tiles * size.parts * (second[:, 1] > 0)
    return work


def fetches(sizes: list[LinearSize], work: Tensor, slot_k: int) -> Tensor:
    """Returns the weights that each block fetches for a token, slot by slot, (blocks, most, 2) int32.

    Each entry is the place of the first 16 × 16 tile among all packed tiles, and the number of tiles.
    """
    most_tiles = slot_k // TILE
    jobs: list[list[tuple[int, int]]] = [[] for _ in range(work.shape[1])]
    begin = 0
    for size, of_layer in zip(sizes, work.tolist(), strict=True):
        for block, (first_unit, count) in enumerate(of_layer):
            for unit in range(first_unit, first_unit + count):
                part, tile = divmod(unit, size.tiles)
                first, stop = size.inputs(part)
                jobs[block] += [
                    (begin + tile * size.k_tiles + k, min(most_tiles, stop - k)) for k in range(first, stop, most_tiles)
                ]
        begin += size.tiles * size.k_tiles
    table = torch.zeros(len(jobs), max(map(len, jobs)), 2, dtype=torch.int32, device="cpu")
    for block, of_block in enumerate(jobs):
        if of_block:
            table[block, : len(of_block)] = torch.tensor(of_block, dtype=torch.int32, device="cpu")
    return table


def make_division(shape: BlockShape, rows: int, blocks: int, device: torch.device) -> Division:
    """Returns which block has what of the linear layers in a launch of so many rows.

    blocks: how many there are to divide work among. Pairs leave out the last one of an odd number.
    """
    sizes = divide(shape, rows)
    pairs = sizes[0].groups == 2 and blocks > 1
    work = share_pairs(sizes, blocks // 2 * 2) if pairs else share(sizes, blocks)
    jobs = fetches(sizes, work, slot_inputs(shape))
    return Division(work.to(device), jobs.to(device), int(work[:, :, 1].sum(0).max()), pairs)


def choose_splits(pairs: int, tokens: int, blocks: int) -> int:
    """Returns the number of blocks that share the keys of a row and head, by which the attention takes the least time.

    pairs: the number of rows times heads. The blocks take rounds over all parts.
    """

    def cost(splits: int) -> int:
        keys = max(-(-tokens // splits), min(LEAST_KEYS, tokens))
        return -(-pairs * splits // blocks) * (keys + PART_KEYS) + splits * SPLIT_KEYS

    return min(range(1, MOST_SPLITS + 1), key=cost)


def early_keys(shape: BlockShape, dtype: torch.dtype, blocks: int, l2_bytes: int) -> int:
    """Returns how many keys and values each block asks for some phases before the attention: a third of the L2 cache.

    The weights that pass through it in the meantime are about another third, for the largest models that this is for.
    """
    return l2_bytes // 3 // (blocks * 2 * shape.head_dim * dtype.itemsize)


def attends_together(shape: BlockShape, dtype: torch.dtype) -> bool:
    """Returns whether rows of a sample can share its keys and values on tensor cores (`window.cuh`)."""
    return shape.head_dim == WINDOW_HEAD and dtype.itemsize == 2


def count_tiles(shape: BlockShape, dtype: torch.dtype, samples: Sequence[int], branches: int) -> int:
    """Returns the number of tiles of a parallel pass, runs of at most 32 positions of one sample, or 0 where each row
    attends alone: where heads are not those that tiles are for, or products of 16 rows would be more than half empty.

    samples: the sample of each position.
    """
    if not attends_together(shape, dtype) or len(samples) * branches <= 8:
        return 0
    runs = [len(list(run)) for _, run in groupby(samples)]
    products = sum(-(-run // TILE) for run in runs)
    return sum(-(-run // TILE_ROWS) for run in runs) if len(samples) >= products * TILE // 2 else 0


def make_plan(
    shape: BlockShape,
    dtype: torch.dtype,
    *,
    rows: int,
    tiles: int = 0,
    branches: int = 1,
    most_rows: int,
    warps: int,
    jobs: int,
    block_tiles: int,
    blocks: int,
    shared_bytes: int,
) -> Plan:
    """Returns the plan of a launch.

    Raises BackendError if the model is too wide for a block's shared memory.

    rows: R. tiles, branches: see `count_tiles`. most_rows, warps: the rows and the warps of the kernel's instance.
    jobs, block_tiles: the most fetches and tiles of any block.
    blocks: the blocks of the grid. shared_bytes: the shared memory that a block can have, in bytes.
    """
    slot_k, size = slot_inputs(shape), dtype.itemsize
    layers = 4 * shape.layers + 2
    together = warps * TILE * WINDOW_ROW if tiles else 0
    parts = max(warps * (whole(shape.head_dim, 4) + 4), together)
    tables = sum(whole(each, 16) for each in (4 * (MOST_ROWS + 3 * tiles + 1), 12 * layers, 8 * jobs))
    slot = slot_k * TILE * size + (GATES_BYTES if most_rows > NORMED_ROWS else 0)
    group_rows = rows if rows <= GROUP_ROWS else whole(-(-rows // 2), 8)
    sums = {8: 2, 16: 1}.get(most_rows, 3) if size == 2 else 1  # ABREAST in linear.cuh
    multipliers = warps if most_rows <= NORMED_ROWS else max(warps // 2, 1)  # MULTIPLIERS
    tile_sums = 4 * (min(most_rows, GROUP_ROWS) // 8 * multipliers * 128)
    in_slots = most_rows > NORMED_ROWS and tile_sums <= slot_k * TILE * size  # where there are slots to gain

    def working(staged_rows: int, staged_k: int) -> int:
        """Returns the bytes of a product's sums and inputs, where the attention's parts and keys lie in their turn."""
        return max((0 if in_slots else tile_sums * sums) + staged_rows * (staged_k + 8) * size, 4 * parts)

    def taken(staged_rows: int, staged_k: int, bias_tiles: int) -> int:
        """Returns the bytes of all but the ring."""
        return tables + 4 * TILE * bias_tiles + working(staged_rows, staged_k)

    # All inputs of a part for all rows of a group; or those of a slot; or those for some rows. Biases go before any of
    # these does.
    sizes = divide(shape, rows)
    widest = max(-(-size.k_tiles // (1 << size.halvings)) for size in sizes)
    wide = max(slot_k, TILE * widest)
    staged = whole(group_rows, 8)
    inputs = [(staged, wide), *((n, slot_k) for n in range(staged, 0, -8))]
    choices = [(*of, biases) for of in inputs for biases in (block_tiles, 0)]
    least = (8, slot_k, 0)
    choice = next((each for each in choices if shared_bytes - taken(*each) >= GOOD_SLOTS * slot), least)
    count = min((shared_bytes - taken(*choice)) // slot, MOST_SLOTS)
    if count < 1:
        needed = taken(*least) + slot
        raise BackendError(
            f"the CUDA kernel needs {needed} bytes of shared memory for a model of {shape.channels} channels in "
            f"{str(dtype).removeprefix('torch.')}, and a block has {shared_bytes} here; use bfloat16, or "
            "backend='triton'"
        )
    splits = choose_splits((tiles * branches or rows) * shape.heads, shape.tokens, blocks)
    staged_rows, staged_k, bias_tiles = choice
    return Plan(
        slots=count,
        slot_k=slot_k,
        sums_in_slots=in_slots,
        group_rows=group_rows,
        staged_rows=staged_rows,
        staged_k=staged_k,
        tiles=tiles,
        bias_tiles=bias_tiles,
        proj_halvings=sizes[2].halvings,
        fc2_halvings=sizes[4].halvings,
        merges=splits > 1 and rows > MERGED_ROWS,
        splits=splits,
        least_keys=LEAST_KEYS,
        room=working(staged_rows, staged_k) // (2 * WINDOW_ROW * size) if tiles else 0,
        shared_bytes=taken(*choice) + count * slot,
    )
