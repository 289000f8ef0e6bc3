"""What a pass costs at least, what the machine can do, and the models that are measured."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from stand_in import quick_limits

from bench.common import limits, roofline
from bench.common.harness import Case
from bench.common.models import random_model
from bench.suites.gpu.cells import case_of
from bench.suites.peers import SIZES
from tarflow_fast import TarFlowConfig, reference

CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick_limits(monkeypatch)


@pytest.mark.parametrize("nvp", [True, False])
@pytest.mark.parametrize("guided", [True, False])
def test_work_is_what_counting_step_by_step_gives(nvp: bool, guided: bool) -> None:
    config = TarFlowConfig(3, 8, 2, 64, 3, 2, nvp=nvp, num_classes=5)
    model = random_model(config, 0)
    block = model.blocks[0]
    skipped = ("pos_embed", "class_embed")  # a row of each is read, not the table
    weights = {name: value for name, value in block.named_parameters() if name not in skipped}
    rows = 5 * (2 if guided else 1)
    flops = moved = 0
    for i in range(config.num_patches - 1):
        flops += sum(2 * rows * value.numel() for value in weights.values() if value.dim() == 2)
        moved += sum(4 * value.numel() for value in weights.values())
        for _ in range(config.layers_per_block):
            flops += rows * config.block_shape.heads * 2 * (2 * config.head_dim * (i + 1))  # q kᵀ, then p v
            moved += rows * 4 * 2 * config.channels * (i + 1)  # keys and values, read
            moved += rows * 4 * 2 * config.channels  # this token's, written
    work = roofline.inverse_work(config, 5, guided=guided)
    assert work.flops == config.num_blocks * flops
    assert work.bytes == config.num_blocks * moved
    assert work.weight_bytes == sum(4 * value.numel() for value in weights.values())
    cache = 4 * 2 * config.layers_per_block * rows * config.num_patches * config.channels
    assert work.working_set == work.weight_bytes + cache


def test_the_limit_is_the_slower_of_arithmetic_and_memory() -> None:
    work = roofline.Work(flops=100, bytes=10, weight_bytes=1, working_set=1)
    assert roofline.limit(work, matrix_rate=50, bandwidth=10) == (2.0, "arithmetic")
    assert roofline.limit(work, matrix_rate=100, bandwidth=2) == (5.0, "memory")


def test_limits_are_kept_by_size(quick: None) -> None:
    cases = [Case({}, work=roofline.Work(1, 1, 1, size), threads=1) for size in (2**18, 2**16)]
    rates = limits.best(limits.measure(cases[0]), limits.measure(cases[1]))
    assert list(rates) == ["float32_flops_per_second_1", "read_bandwidth_1"]
    small, large = rates["read_bandwidth_1"]
    assert [entry["bytes"] for entry in (small, large)] == [2**16, 2**18]
    assert rates["float32_flops_per_second_1"] > 0
    cell: dict[str, Any] = {"runs": []}
    limits.hold(cell, rates, cases[0])
    assert cell["limit"]["bytes_per_second"] == large["bytes_per_second"] > 0
    with pytest.raises(KeyError):
        limits.hold(cell, rates, Case({}, work=roofline.Work(1, 1, 1, 2**17), threads=1))


def test_of_two_measurements_the_higher_rates_are_the_limit() -> None:
    def rates(matrix: float, *read: float) -> dict[str, Any]:
        entries = [{"bytes": 2**i, "bytes_per_second": rate} for i, rate in enumerate(read)]
        return {
            "matrix_flops_per_second": matrix,
            "read_bandwidth": entries,
            "bf16_matrix_flops_per_second": 9 - matrix,
        }

    merged = limits.best(rates(1.0, 5.0, 2.0), rates(2.0, 4.0, 3.0))
    assert merged == {**rates(2.0, 5.0, 3.0), "bf16_matrix_flops_per_second": 8.0}


@pytest.mark.parametrize("name", ["medium", "small", "tiny"])
def test_random_weights_have_the_log_scales_of_a_trained_model(name: str) -> None:
    config = SIZES[name]
    before = torch.random.get_rng_state()
    model = random_model(config, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(map(torch.equal, model.parameters(), random_model(config, seed=3).parameters()))
    x = torch.randn(4, config.num_patches, config.token_dim)
    xa, xb = reference.affine_parameters(model.state_dict(), 0, x, None)
    assert 0.05 < xa.std() < 0.5
    assert 0.05 < xb.std() < 0.5


def test_guided_rows_count_twice_and_bf16_half() -> None:
    guided, unguided = (case_of(f"afhq:2:{what}", True).work for what in ("guided", "unguided"))
    assert guided.flops == 2 * unguided.flops
    sizes = case_of("afhq:2:guided", True).sizes
    assert 2 * unguided.bytes == roofline.inverse_work(sizes, 2).bytes


@pytest.mark.parametrize("backward", [False, True])
def test_density_work_is_what_counting_token_by_token_gives(backward: bool) -> None:
    sizes = case_of("imagenet:3:loss", True).sizes
    skipped = ("pos_embed", "class_embed")
    weights = [value for name, value in random_model(sizes, 0).named_parameters() if not name.endswith(skipped)]
    flops = 0
    for i in range(sizes.num_patches):
        flops += sum(2 * 3 * value.numel() for value in weights if value.dim() == 2)
        flops += sizes.layers_per_block * 3 * 2 * (2 * sizes.channels * (i + 1))  # q kᵀ, then p v
    work = roofline.density_work(sizes, 3, backward=backward)
    held, values = 4 * sum(value.numel() for value in weights), 4 * 3 * sizes.num_patches * sizes.token_dim
    assert work.flops == (3 if backward else 1) * flops
    assert work.bytes == (3 * held + 3 * values if backward else held + 2 * values)


def test_a_gpu_has_one_bandwidth_for_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    quick_limits(monkeypatch)
    rates = limits.measure_gpu(CPU)
    assert rates["matrix_flops_per_second"] > 0
    cell: dict[str, Any] = {"runs": []}
    limits.hold(cell, rates, Case({}, work=roofline.Work(1, 1, 1, 7)))
    assert cell["limit"]["bytes_per_second"] == rates["copy_bandwidth"][0]["bytes_per_second"] > 0
    better = {"matrix_flops_per_second": 0.0, "copy_bandwidth": [{"bytes": 2**20, "bytes_per_second": math.inf}]}
    assert limits.best(rates, better) == {**better, "matrix_flops_per_second": rates["matrix_flops_per_second"]}
