"""`bench limit`: what the parts of the limit are made of, that a wrong pass is not timed, and the suite end to end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from PIL import Image
from stand_in import bench, quick_limits
from torch import Tensor

from bench.common import limits, machine, record, roofline
from bench.common.harness import TOLERANCE
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
    monkeypatch.setattr(limit, "PART", 0.0)


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
    now, seen = [0.0], set[int]()
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    durations = iter([0.25, 0.5, 0.125, 0.25, 0.25])

    def work() -> None:
        now[0] += next(durations)
        seen.add(torch.get_num_threads())

    before = torch.get_num_threads()
    assert limit.paced(work, before + 1, 0.75) == 0.375
    assert limit.paced(work, before + 1, 0.1) == 0.125
    assert seen == {before + 1}
    assert torch.get_num_threads() == before


def test_one_way_alone_is_not_timed() -> None:
    ran = list[int]()
    assert limit.quickest(3, [lambda: ran.append(1)])[0] == 3
    assert ran == []
    slow, fast = (lambda: time.sleep(0.01)), (lambda: None)
    assert limit.quickest(3, [slow, fast]) == (3, fast)


def test_reading_and_multiplying_count_what_they_do() -> None:
    size, ways = limits.reads(3 * 4 * limits.ROW + 5)
    assert size == 3 * 4 * limits.ROW
    ones = torch.ones(3 * limits.ROW).view(torch.float64).sum()
    wanted = (3.0 * limits.ROW, ones.item(), 3.0 * limits.ROW)
    assert tuple(float(torch.as_tensor(way()).sum()) for way in ways) == wanted
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
        assert [each["name"] for each in cell["runs"]] == [counted(n, "thread") for n in sorted({1, machine.cores()})]
        for each in cell["runs"]:
            assert all(seconds > 0 for part in each["parts"].values() for seconds in part["seconds"])
            assert len(each["share"]["samples"]) == len(each["weighted"]["samples"]) == 3
    assert made["settings"]["instruction_set"] == choose_instruction_set()
    assert "time-weighted" in result.output
    with Image.open(out.with_suffix(".png")) as picture:
        assert picture.width > 300


@native
@pytest.mark.parametrize("slow", ["products", "reads"])
def test_shares_are_of_the_same_round(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, slow: str) -> None:
    """A machine that is half as fast in every other round has the same shares in all, of its own for each number of
    threads."""
    rounds: dict[Any, int] = {}
    monkeypatch.setattr(limit, "quickest", lambda amount, ways: (amount, ways))  # as many as tell them apart
    monkeypatch.setattr(limit.torch.backends.mkldnn, "is_available", lambda: False)

    def seconds(run: Any, threads: int, least: float) -> float:
        what = {1: "products", 3: "reads"}[len(run)] if isinstance(run, list) else "pass"
        turn = rounds[what, threads] = rounds.get((what, threads), 0) + 1
        return {"products": 2.0, "reads": 3.0, "pass": 8.0, slow: 1e6}[what] * (1 + turn % 2) / threads

    monkeypatch.setattr(limit, "paced", seconds)
    (option,) = (each for each in SUITE.options if each.name == "threads")
    monkeypatch.setattr(option, "type", click.IntRange(1, 2))
    assert run(tmp_path / "run.json", "--threads", "1", "--threads", "2", "--dtype", "float32").exit_code == 0
    (cell,) = record.read(tmp_path / "run.json")["cells"]
    work, steps = cell["work"], SIZES["tiny"].num_patches - 1
    unit = {"products": 2.0, "reads": 3.0, slow: 1e6}
    products = unit["products"] * roofline.product_flops(SIZES["tiny"], 2) / (2 * limits.MATRIX_SIZE**3)
    weights = unit["reads"] * steps * work["weight_bytes"] / limits.reads(work["working_set"])[0]
    attention = unit["reads"] * work["bytes"] / limits.reads(work["working_set"])[0] - weights
    assert (products > weights) == (slow == "products")
    for threads, each in enumerate(cell["runs"], 1):
        assert each["seconds"] == [16.0 / threads, 8.0 / threads, 16.0 / threads]
        for part, of in (("products", products), ("weights", weights), ("attention", attention)):
            assert each["parts"][part]["seconds"] == pytest.approx([2 * of / threads, of / threads, 2 * of / threads])
        assert each["sequence"]["samples"] == pytest.approx([(products + weights + attention) / 8] * 3)
        assert each["weighted"]["samples"] == pytest.approx([(products + attention) / 8] * 3)
        assert each["share"]["samples"] == pytest.approx([(max(products, weights) + attention) / 8] * 3)


def last_is_off(x: Tensor) -> None:
    x[-1] += 1e-3


def one_is_not_finite(x: Tensor) -> None:
    x[1, 0, 0] = float("nan")


@native
@pytest.mark.parametrize("spoil", [last_is_off, one_is_not_finite])
def test_a_wrong_pass_is_not_timed(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, spoil: Any) -> None:
    reverse = CpuEngine.reverse

    def wrong(self: CpuEngine, state: Any, *given: Any) -> None:
        reverse(self, state, *given)
        spoil(state.x)

    monkeypatch.setattr(CpuEngine, "reverse", wrong)
    result = run(tmp_path / "run.json", "--batch", "3", "--threads", "1", "--dtype", "float32")
    assert result.exit_code == 1
    assert "2 of 2 checks failed; what failed was not timed" in result.output
    made = record.read(tmp_path / "run.json")
    assert [cell["runs"] for cell in made["cells"]] == [[], []]
    assert "FAILED" in SUITE.table(made)


def test_bf16_may_be_off_by_twice_the_torch_backend_s_own_error() -> None:
    exact, half = (limit.plain("tiny", dtype, 0) for dtype in (torch.float32, torch.bfloat16))
    own = float((half - exact).abs().max())
    assert own > 0
    unit = torch.finfo(torch.bfloat16).eps * float(exact.abs().max())
    assert limit.allowed("tiny", torch.bfloat16, 0) == pytest.approx(2 * own + unit / 2)
    assert limit.allowed("tiny", torch.float32, 0) == TOLERANCE
