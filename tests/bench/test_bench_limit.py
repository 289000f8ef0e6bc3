"""`bench limit`: what the parts of the limit are made of, that a wrong pass is not timed, and the suite end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from stand_in import bench, quick_limits
from torch import Tensor

from bench.common import limits, machine, record, roofline
from bench.common.record import counted
from bench.suites import limit
from bench.suites.limit import SIZES, SUITE
from tarflow_fast.backend.cpu.engine import CpuEngine, cpu_missing
from tarflow_fast.native import choose_instruction_set

native = pytest.mark.skipif(cpu_missing() is not None, reason=str(cpu_missing()))


def run(out: Path, *more: str) -> Any:
    return bench("limit", "--config", "tiny", "--batch", "2", "--repeat", "3", "--out", out, *more)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick_limits(monkeypatch)
    monkeypatch.setattr(limit, "PACE", 0.0)


@pytest.mark.parametrize("model", SIZES)
def test_the_parts_are_all_of_the_work(model: str) -> None:
    sizes = SIZES[model]
    work = roofline.inverse_work(sizes, 5)
    parts = SUITE._amounts(limit.Case({"batch": 5}, sizes, work))
    assert parts["weights"] == ("reads", (sizes.num_patches - 1) * work.weight_bytes)
    assert parts["weights"][1] + parts["attention"][1] == work.bytes
    steps = sizes.num_patches * (sizes.num_patches - 1)  # twice the keys that are seen
    attention = 5 * 2 * sizes.layers_per_block * sizes.channels * steps
    assert parts["products"] == ("products", work.flops - attention)


def test_a_turn_is_the_mean_of_the_runs_that_fill_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    durations = iter([0.25, 0.5, 0.125, 0.25, 0.25])

    def work() -> None:
        now[0] += next(durations)

    monkeypatch.setattr(limit, "PACE", 0.75)
    assert limit.paced(work) == 0.375
    monkeypatch.setattr(limit, "PACE", 0.1)
    assert limit.paced(work) == 0.125


def test_reading_and_multiplying_count_what_they_do() -> None:
    size, ways = limits.reads(3 * 4 * limits.ROW + 5)
    assert size == 3 * 4 * limits.ROW
    assert [float(torch.as_tensor(way()).sum()) for way in ways[::2]] == [3 * limits.ROW] * 2
    flops, products = limits.square_products(torch.bfloat16)
    assert flops == 2 * limits.MATRIX_SIZE**3
    assert len(products) == 1


@native
def test_end_to_end(tmp_path: Path, quick: None) -> None:
    threads, out = torch.get_num_threads(), tmp_path / "run.json"
    result = run(out)
    assert result.exit_code == 0, result.output
    assert torch.get_num_threads() == threads
    made = record.read(out)
    assert [cell["label"]["dtype"] for cell in made["cells"]] == ["float32", "bfloat16"]
    for cell in made["cells"]:
        assert cell["check"]["passed"]
        assert 0 < cell["check"]["max_error"] <= cell["check"]["tolerance"]
        assert [each["name"] for each in cell["runs"]] == [counted(n, "thread") for n in range(1, machine.cores() + 1)]
        for each in cell["runs"]:
            parts = {part: spread["median"] for part, spread in each["parts"].items()}
            assert all(seconds > 0 for seconds in parts.values())
            assert len(each["share"]["samples"]) == len(each["weighted"]["samples"]) == 3
    assert made["settings"]["instruction_set"] == choose_instruction_set()
    assert "time-weighted" in result.output
    with Image.open(out.with_suffix(".png")) as picture:
        assert picture.width > 300


@native
def test_shares_are_of_the_same_round(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is half as fast in every other round has the same shares in all."""
    turns = [0]

    def seconds(on: Any) -> float:
        turns[0] += 1
        return (1.0, 2.0, 8.0)[(turns[0] - 1) % 3] * (1 + (turns[0] - 1) // 3 % 2)

    monkeypatch.setattr(limit, "paced", seconds)
    assert run(tmp_path / "run.json", "--threads", "1", "--dtype", "float32").exit_code == 0
    (cell,) = record.read(tmp_path / "run.json")["cells"]
    (each,) = cell["runs"]
    assert each["seconds"] == [8.0, 16.0, 8.0]
    parts, work, steps = each["parts"], cell["work"], SIZES["tiny"].num_patches - 1
    bytes_read = limits.reads(work["working_set"])[0]
    products = roofline.product_flops(SIZES["tiny"], 2) / (2 * limits.MATRIX_SIZE**3)
    weights = 2.0 * steps * work["weight_bytes"] / bytes_read
    attention = 2.0 * work["bytes"] / bytes_read - weights
    assert parts["products"]["median"] == pytest.approx(products)
    assert parts["weights"]["median"] == pytest.approx(weights)
    assert each["weighted"]["samples"] == pytest.approx([(products + attention) / 8] * 3)
    assert each["share"]["samples"] == pytest.approx([(weights + attention) / 8] * 3)


@native
@pytest.mark.parametrize("spoil", [lambda x: x + 1e-3, lambda x: x.log()], ids=["off", "nan"])
def test_a_wrong_pass_is_not_timed(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, spoil: Any) -> None:
    reverse = CpuEngine.reverse

    def wrong(self: CpuEngine, state: Any, *given: Any) -> None:
        reverse(self, state, *given)
        spoiled: Tensor = spoil(state.x)
        state.x.copy_(spoiled)

    monkeypatch.setattr(CpuEngine, "reverse", wrong)
    result = run(tmp_path / "run.json", "--threads", "1", "--dtype", "float32")
    assert result.exit_code == 1
    assert "1 of 1 checks failed; what failed was not timed" in result.output
    (cell,) = record.read(tmp_path / "run.json")["cells"]
    assert cell["runs"] == []
    assert "FAILED" in SUITE.table(record.read(tmp_path / "run.json"))
