"""What a probe holds an engine to: a right engine passes all of it, and each fault is found, and named."""

from __future__ import annotations

import fake_device
import pytest
import torch
from fake_device import fake
from probe_jobs import LONG, SHAPE, job_of, run_here

from tarflow_fast.engine.shape import BlockShape
from tarflow_fast.engine.verdict import Size
from tarflow_fast.probe import laws
from tarflow_fast.probe.job import EngineJob

SIZES = [Size(1, False), Size(3, True), Size(8, False), Size(9, True)]


@pytest.fixture(autouse=True)
def _forget() -> None:
    fake_device._leaked.clear()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_right_engine_passes(size: Size, dtype: torch.dtype) -> None:
    rows, times = run_here(job_of(fake(), size, dtype=dtype))
    assert [row for row in rows if row.fault is not None] == []
    assert times.keys() == {"torch", "fake, none"}
    assert {row.check.rpartition(", batch")[0] for row in rows} == set(laws.LAWS)
    numbers = [row for row in rows if row.check.startswith("accuracy")]
    assert all(row.error is not None and row.allowed is not None and row.error <= row.allowed for row in numbers)


@pytest.mark.parametrize(
    "shape",
    [
        BlockShape(1, 3, 8, 1, 1, 8, 16),
        BlockShape(2, 3, 8, 1, 2, 4, 16, classes=3),
        BlockShape(9, 1, 8, 2, 1, 8, 32, transform="shift"),
        LONG,
    ],
    ids=str,
)
def test_any_sizes(shape: BlockShape) -> None:
    rows, times = run_here(job_of(fake(), Size(2, True), shape, repeats=2))
    assert [row for row in rows if row.fault is not None] == []
    assert len(rows) == (0 if shape.tokens == 1 else len(laws.LAWS))
    assert times


FAULTS = {
    "wrong rows": (Size(9, False), SHAPE, "accuracy, batch 9", "off in sample 8, and at most"),
    "wrong late": (Size(2, False), LONG, "accuracy, batch 2", "a pass over all tokens: tokens 0.1 off in sample 0"),
    "NaN leaks": (Size(2, True), SHAPE, "NaN stays where it is, batch 2, guided", "NaN in sample 0 changes"),
    "looks ahead": (Size(1, False), SHAPE, "NaN stays where it is, batch 1", "NaN in token 6 changes tokens before it"),
    "writes beyond": (Size(2, False), SHAPE, "accuracy, batch 2", "a write after the buffer (2, 12, 2)"),
    "other bits": (Size(2, False), SHAPE, "same bits again, batch 2", "has other bits in repeat 2"),
    "leaks": (Size(2, False), SHAPE, "same bits again, batch 2", "MiB more are held after the repeats"),
    "uses old memory": (Size(2, False), SHAPE, "poisoned caches, batch 2", "nan in a cache that was not written to"),
    "changes its input": (Size(2, False), SHAPE, "inputs unchanged, batch 2", "z changed"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found(fault: str) -> None:
    size, shape, check, why = FAULTS[fault]
    rows, times = run_here(job_of(fake(fault), size, shape, repeats=12))
    found = {row.check: row.fault for row in rows if row.fault is not None}
    assert why in (found.get(check) or ""), found
    assert times == {}


def test_one_row_count_is_found_from_another_of_its_bucket() -> None:
    """Kernels change at 9 samples: that one is tried where 16 are asked for."""
    rows, _ = run_here(job_of(fake("wrong rows"), Size(16, False)))
    assert [row.check for row in rows if row.fault is not None] == ["accuracy, batch 9"]


@pytest.mark.parametrize(
    ("size", "batches"),
    [
        (Size(1, False), [1]),
        (Size(7, False), [7, 8]),
        (Size(16, False), [16, 9]),
        (Size(40, False), [40, 33, 64]),
        (Size(65, False), [65]),
        (Size(200, False), [200]),
        (Size(4, True), [4]),
        (Size(20, True), [20, 17, 32]),
        (Size(33, True), [33]),
    ],
    ids=str,
)
def test_the_batches_that_are_tried(size: Size, batches: list[int]) -> None:
    assert job_of(fake(), size).batches == batches


def test_positions_are_those_where_kernels_change() -> None:
    from tarflow_fast.probe.subject import Subject

    def positions(tokens: int) -> list[int]:
        shape = BlockShape(tokens, 2, 8, 1, 1, 8, 16)
        return Subject(job_of(fake(), shape=shape), shape).positions

    assert positions(1024) == [1, 2, 127, 128, 129, 255, 256, 257, 512, 1022, 1023]
    assert positions(16) == [1, 2, 8, 14, 15]
    assert positions(2) == [1]


def test_errors_of_half_precision_are_measured_by_those_of_torch() -> None:
    """fp16 passes as fp16, and the same numbers do not pass as fp32."""
    half = job_of(fake(), dtype=torch.float16)
    case = next(case for case in laws.cases(half) if case.law == "accuracy")
    from tarflow_fast.probe.subject import Subject

    subject = Subject(half, SHAPE)
    assert laws.check(subject, case).fault is None
    strict = Subject(job_of(fake()), SHAPE)
    strict.engine = subject.engine
    finding = laws.check(strict, case)
    assert finding.fault is not None
    assert finding.error is not None
    assert finding.allowed is not None
    assert finding.error > 10 * finding.allowed


def test_a_variant_has_the_same_bits() -> None:
    from dataclasses import replace

    backend = replace(fake(), variants=lambda request: {"another way": fake("other bits").maker(request)})
    rows, _ = run_here(job_of(backend))
    found = [row.fault for row in rows if row.fault is not None]
    assert len(found) == 1
    assert str(found[0]).startswith("another way: steps [1, 9), 0 has other bits")


def test_jobs_are_checked_block_by_block() -> None:
    job = job_of(fake(), Size(2, False))
    both = EngineJob(**{**vars(job), "shapes": (SHAPE, LONG), "repeats": 2})
    assert len(run_here(both)[0]) == 2 * len(run_here(job)[0])
