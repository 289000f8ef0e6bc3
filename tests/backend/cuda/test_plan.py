"""How the CUDA engine divides work: pure functions, without the kernel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tarflow_fast import BackendError
from tarflow_fast.backend.cuda.pack import TILE, LinearSize
from tarflow_fast.backend.cuda.plan import (
    MOST_SLOTS,
    MOST_SPLITS,
    choose_splits,
    count_tiles,
    divide,
    early_keys,
    fetches,
    grid_blocks,
    make_division,
    make_plan,
    share,
    share_pairs,
)
from tarflow_fast.engine import BlockShape
from tarflow_fast.models.config import TarFlowConfig

AFHQ = TarFlowConfig(3, 256, 8, 768, 8, 8, num_classes=3).block_shape
IMAGENET64 = TarFlowConfig(3, 64, 2, 768, 8, 8, num_classes=1000).block_shape
H200, A100 = 232448, 166912  # bytes of shared memory that a block can have
some_sizes = st.lists(
    st.builds(LinearSize, st.integers(1, 40), st.integers(8, 12), st.integers(0, 3), st.integers(1, 2)),
    min_size=1,
    max_size=12,
)


@given(sizes=some_sizes, blocks=st.integers(1, 30))
def test_every_tile_is_one_blocks(sizes: list[LinearSize], blocks: int) -> None:
    """Or one block's for each part of its inputs and group of rows. The most tiles of a block are as few as can be. No
    more blocks have tiles of a part, each of which reads it, than that takes, and they have about as many as each
    other."""
    work = share(sizes, blocks)
    for size, of_layer in zip(sizes, work.tolist(), strict=True):
        taken = [unit for first, count in of_layer for unit in range(first, first + count)]
        parts = size.parts
        assert sorted(taken) == list(range(size.tiles * parts))
        if blocks < parts:
            groups = {0: [count for _, count in of_layer if count]}
        else:
            for first, count in of_layer:  # no block has tiles of two parts
                assert count == 0 or first // size.tiles == (first + count - 1) // size.tiles
            groups = {p: [n for first, n in of_layer if n and first // size.tiles == p] for p in range(parts)}
        for part, counts in groups.items():
            most = -(-sum(counts) // len(range(part, blocks, len(groups))))
            assert max(counts) == most
            assert len(counts) == -(-sum(counts) // most)
            assert most - min(counts) <= 1


@given(sizes=some_sizes, blocks=st.integers(1, 30), slot_tiles=st.integers(1, 12))
def test_blocks_fetch_their_tiles_in_order(sizes: list[LinearSize], blocks: int, slot_tiles: int) -> None:
    """Slot by slot, what the kernel's products take: all inputs of a tile, then of the next, layer after layer."""
    work = share(sizes, blocks)
    jobs = fetches(sizes, work, slot_tiles * TILE)
    for block in range(blocks):
        fetched, begin = [], 0
        for place, count in jobs[block].tolist():
            assert 0 <= count <= slot_tiles
            fetched += range(place, place + count)
        wanted = []
        for size, (first, count) in zip(sizes, work[:, block].tolist(), strict=True):
            for part, tile in (divmod(unit, size.tiles) for unit in range(first, first + count)):
                of_part = range(*size.inputs(part))
                wanted += [begin + tile * size.k_tiles + k for k in of_part]
            begin += size.tiles * size.k_tiles
        assert fetched == wanted
        counts = jobs[block, :, 1]
        assert not counts[int((counts > 0).sum()) :].any()  # a 0 ends the list


@given(sizes=some_sizes, pairs=st.integers(1, 15))
def test_the_blocks_of_a_pair_have_the_same_tiles_for_a_group_of_rows_each(sizes: list[LinearSize], pairs: int) -> None:
    """Every unit is one block's, and a pair fetches the same weights in the same order."""
    sizes = [size._replace(groups=2) for size in sizes]
    work = share_pairs(sizes, 2 * pairs)
    for size, of_layer in zip(sizes, work.tolist(), strict=True):
        taken = [unit for first, count in of_layer for unit in range(first, first + count)]
        assert sorted(taken) == list(range(size.tiles * size.parts))
        of_group = size.tiles * size.parts // 2
        assert all(unit < of_group for first, count in of_layer[::2] for unit in range(first, first + count))
    jobs = fetches(sizes, work, 12 * TILE)
    assert torch.equal(jobs[::2], jobs[1::2])


@pytest.mark.parametrize(
    ("rows", "blocks", "pairs"), [(32, 132, False), (33, 132, True), (64, 3, True), (64, 1, False)]
)
def test_blocks_are_pairs_where_rows_are_two_groups(rows: int, blocks: int, pairs: bool) -> None:
    division = make_division(AFHQ, rows, blocks, torch.device("cpu"))
    assert division.pairs == pairs
    assert division.blocks == (blocks // 2 * 2 if pairs else blocks)


@pytest.mark.parametrize("shape", [AFHQ, IMAGENET64], ids=["AFHQ", "ImageNet"])
@pytest.mark.parametrize("blocks", [108, 132, 148])
@pytest.mark.parametrize("rows", [2, 64])
def test_blocks_fetch_about_as_much(shape: BlockShape, blocks: int, rows: int) -> None:
    sizes = divide(shape, rows)
    tiles = make_division(shape, rows, blocks, torch.device("cpu")).jobs[:, :, 1].sum(1)
    assert tiles.sum() == sum(size.tiles * size.k_tiles * (2 if rows == 64 else 1) for size in sizes)
    assert tiles.max() <= 1.06 * tiles.double().mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shared_bytes", [H200, A100])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 16, 31, 32, 64])
def test_a_plan_fits(dtype: torch.dtype, shared_bytes: int, rows: int) -> None:
    most_rows = next(n for n in (8, 16, 64) if n >= rows)
    plan = make_plan(
        AFHQ,
        dtype,
        rows=rows,
        most_rows=most_rows,
        warps=8,
        jobs=40,
        block_tiles=40,
        blocks=132,
        shared_bytes=shared_bytes,
    )
    assert plan.shared_bytes <= shared_bytes
    assert 1 <= plan.slots <= MOST_SLOTS
    assert plan.slot_k % TILE == 0
    assert plan.slot_k >= AFHQ.channels
    assert plan.staged_rows % 8 == 0
    assert 8 <= plan.staged_rows <= most_rows
    assert 1 <= plan.splits <= MOST_SPLITS
    if dtype == torch.bfloat16 and shared_bytes == H200:  # what the engine is for
        assert plan.staged_rows >= plan.group_rows
        assert plan.slots >= 4


def test_rows_attend_together_in_tiles_of_one_sample() -> None:
    """Up to 32 rows each; where 16 rows would be less than half full, or rows are few, each row attends by itself."""

    def count(*runs: int, branches: int = 1, shape: BlockShape = AFHQ, dtype: torch.dtype = torch.bfloat16) -> int:
        samples = [sample for sample, length in enumerate(runs) for _ in range(length)]
        return count_tiles(shape, dtype, samples, branches)

    assert [count(n) for n in (8, 9, 16, 17, 32, 33, 64)] == [0, 1, 1, 1, 1, 2, 2]
    assert count(8, branches=2) == 1
    assert [count(16, 16), count(9, 9), count(8, 8), count(7, 7), count(17, 1)] == [2, 2, 2, 0, 0]
    assert count(33, dtype=torch.float16) == 2
    assert count(32, dtype=torch.float32) == 0
    assert count(32, shape=TarFlowConfig(3, 64, 8, 96, 1, 1, head_dim=48).block_shape) == 0


def test_biases_make_way_for_the_ring() -> None:
    """In little shared memory: they are then read from global memory."""
    sizes = {"rows": 64, "most_rows": 64, "warps": 8, "jobs": 80, "block_tiles": 28, "blocks": 132}
    slot, staged = 768 * 16 * 2, 32 * (768 + 8) * 2
    roomy, tight = (
        make_plan(AFHQ, torch.bfloat16, shared_bytes=staged + 4 * slot + more, **sizes) for more in (4096, 2048)
    )
    assert (roomy.slots, roomy.staged_rows, roomy.bias_tiles) == (4, 32, 28)
    assert (tight.slots, tight.staged_rows, tight.bias_tiles) == (4, 32, 0)


def test_parts_of_the_attention_and_sums_lie_where_other_memory_is_free() -> None:
    """At 64 rows of AFHQ's model, on an H200: parts in the place of a product's inputs, sums in that of its weights, so
    that the ring has seven slots. Those of a narrow model are too small for sums."""
    sizes = {"rows": 64, "most_rows": 64, "warps": 8, "jobs": 80, "block_tiles": 80, "blocks": 132}
    alone, together = (make_plan(AFHQ, torch.bfloat16, tiles=n, shared_bytes=H200, **sizes) for n in (0, 4))
    assert (alone.slots, alone.group_rows, alone.staged_rows, alone.sums_in_slots) == (7, 32, 32, True)
    assert together.shared_bytes - alone.shared_bytes == 48  # what tiles are
    narrow = TarFlowConfig(3, 64, 8, 192, 1, 1).block_shape
    assert not make_plan(narrow, torch.bfloat16, shared_bytes=H200, **sizes).sums_in_slots
    groups = [
        make_plan(AFHQ, torch.bfloat16, shared_bytes=H200, **{**sizes, "rows": n}).group_rows for n in (32, 33, 50)
    ]
    assert groups == [32, 24, 32]


def test_a_model_too_wide_is_refused() -> None:
    wide = TarFlowConfig(3, 64, 8, 8192, 1, 1).block_shape
    with pytest.raises(BackendError, match=r"needs \d+ bytes of shared memory for a model of 8192 channels in float32"):
        make_plan(
            wide, torch.float32, rows=1, most_rows=8, warps=8, jobs=10, block_tiles=10, blocks=132, shared_bytes=H200
        )


def test_inputs_are_halved_as_far_as_parts_have_something_for_each_warp() -> None:
    """Those of proj and fc2, and for few rows into two parts, which every block adds up."""
    small = TarFlowConfig(1, 8, 2, 64, 2, 1).block_shape

    def halvings(shape: BlockShape, rows: int) -> list[int]:
        return [size.halvings for size in divide(shape, rows)][:5]

    few, many, two_groups = [0, 0, 1, 0, 1], [0, 0, 2, 0, 3], [0, 0, 1, 0, 2]
    assert [halvings(AFHQ, rows) for rows in (1, 16, 17, 32, 33)] == [few, few, many, many, two_groups]
    assert [halvings(small, rows) for rows in (1, 32, 64)] == [[0, 0, 0, 0, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]
    assert divide(AFHQ, 64)[-1].halvings == 0


def test_keys_are_asked_for_early_as_far_as_the_cache_keeps_them() -> None:
    assert early_keys(AFHQ, torch.bfloat16, 132, 50 << 20) == 517
    assert early_keys(AFHQ, torch.float32, 82, 6 << 20) == 49


@given(pairs=st.integers(1, 1000), tokens=st.integers(1, 4096), blocks=st.integers(1, 200))
def test_keys_are_split_no_further_than_pays(pairs: int, tokens: int, blocks: int) -> None:
    splits = choose_splits(pairs, tokens, blocks)
    assert 1 <= splits <= MOST_SPLITS
    if pairs % blocks == 0 or tokens <= 64:  # all blocks have as much to do already, or each too little to share
        assert splits == 1
    if 16 * pairs <= blocks and tokens >= 1024:
        assert splits >= 4


def test_the_grid_has_a_block_for_each_multiprocessor_that_has_work() -> None:
    assert grid_blocks(AFHQ, 132) == 132
    small = TarFlowConfig(1, 8, 2, 64, 2, 1).block_shape
    assert grid_blocks(small, 132) == 16  # tiles of fc1
