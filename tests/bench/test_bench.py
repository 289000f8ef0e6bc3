"""The bench: its arithmetic, its record, table and picture, and `peers` end to end against a stand-in."""

from __future__ import annotations

import copy
import itertools
import json
import platform
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import Result
from PIL import Image
from stand_in import bench, quick_limits, stand_in

from bench.common import harness, limits, machine, record, roofline
from bench.common.harness import TOLERANCE, Rounds, admit_all
from bench.common.limits import hold_to_limit
from bench.common.models import random_model
from bench.common.plot import cells_figure as picture
from bench.suites.peers import CPU, SIZES, SUITE
from tarflow_fast import NonFiniteError, TarFlowConfig, reference
from tarflow_fast.engine.cpu_engine import cpu_missing


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick_limits(monkeypatch)


def peers(checkout: Path, out: Path, *more: str) -> Result:
    return bench("peers", "--ml-tarflow", checkout, "--config", "tiny", "--repeat", "3", "--out", out, *more)


def made_up_record(*, failed: bool = False) -> dict[str, Any]:
    work = roofline.Work(flops=4_000_000_000, bytes=1_000_000_000, weight_bytes=10, working_set=20)
    samples = {"theirs": [4.0, 4.4, 4.2], "torch": [2.0, 2.1, 2.2], "torch compiled": [1.0, 1.0, 1.0]}
    checks = {"passed": True, "max_error": 1e-6, "tolerance": TOLERANCE, "reason": None}
    cell = {"label": {"model": "m", "batch": 1, "guidance": 0.0}, "check": checks, "work": work.to_dict()}
    cells = [{**cell, "runs": harness.runs_of(samples, work)}]
    slow = {"matrix_flops_per_second": 1e11, "read_bandwidth": [{"bytes": 20, "bytes_per_second": 2e9}]}
    hold_to_limit(cells[0], slow)  # 0.5 s of memory traffic
    if failed:
        bad = {**checks, "passed": False, "max_error": None, "reason": "torch: not finite"}
        cells.append({"label": {"model": "m", "batch": 64, "guidance": 2.0}, "check": bad, "runs": []})
    return {
        "suite": "peers",
        "machine": {"cpu": "a processor", "os": "a system", "torch": "2.x"},
        "settings": {"baseline": "theirs", "threads": 2, "dtype": "float32"},
        "limits": {
            "matrix_flops_per_second": 1e11,
            "read_bandwidth": [{"bytes": 2**20, "bytes_per_second": 5e10}],
        },
        "cells": cells,
    }


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
    assert roofline.limit_seconds(work, matrix_rate=50, bandwidth=10) == 2.0
    assert roofline.limited_by(work, matrix_rate=50, bandwidth=10) == "arithmetic"
    assert roofline.limit_seconds(work, matrix_rate=100, bandwidth=2) == 5.0
    assert roofline.limited_by(work, matrix_rate=100, bandwidth=2) == "memory"


def test_limits_are_kept_by_size(quick: None) -> None:
    rates = limits.measure([2**16, 2**16, 2**18])
    assert [entry["bytes"] for entry in rates["read_bandwidth"]] == [2**16, 2**18, 2**20]
    assert rates["matrix_flops_per_second"] > 0
    assert limits.bandwidth(rates, 2**18) == rates["read_bandwidth"][1]["bytes_per_second"] > 0
    with pytest.raises(KeyError):
        limits.bandwidth(rates, 2**17)


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


class Clock:
    """Time that passes only when a candidate runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log = ""

    def candidate(self, name: str, *seconds: float) -> Any:
        left = list(seconds)

        def run() -> None:
            self.log += name
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run

    def __call__(self) -> float:
        return self.now


def alternate(candidates: Any, repeat: int, budget: float, clock: Clock) -> dict[str, list[float]]:
    def timer(run: Any) -> float:
        return harness.wall(run, clock)

    return Rounds(repeat, budget, timer=timer, clock=clock).alternate(candidates)


def test_candidates_take_turns() -> None:
    clock = Clock()
    candidates = {"a": clock.candidate("a", 1.0, 2.0, 3.0), "b": clock.candidate("b", 10.0)}
    samples = alternate(candidates, 3, 1000, clock)
    assert clock.log == "ababab"
    assert samples == {"a": [1.0, 2.0, 3.0], "b": [10.0, 10.0, 10.0]}


@pytest.mark.parametrize(("budget", "rounds"), [(0.1, 1), (10.0, 1), (20.0, 2), (49.0, 4), (1000.0, 7)])
def test_a_budget_lowers_the_repetitions_to_no_less_than_one(budget: float, rounds: int) -> None:
    clock = Clock()
    candidates = {"a": clock.candidate("a", 4.0), "b": clock.candidate("b", 6.0)}
    samples = alternate(candidates, 7, budget, clock)
    assert len(samples["a"]) == len(samples["b"]) == rounds
    assert clock.now <= max(budget, 10.0)


def test_ratios_are_taken_round_by_round() -> None:
    found = harness.ratio([2.0, 20.0, 200.0], [1.0, 10.0, 100.0])  # a machine that slows down
    assert found == {"samples": [2.0] * 3, "median": 2.0, "p20": 2.0, "p80": 2.0}
    assert harness.spread([0.0, 1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx({"median": 2.5, "p20": 1.0, "p80": 4.0})


def test_runs_hold_every_sample_and_the_rates_at_the_median() -> None:
    theirs, ours, _ = made_up_record()["cells"][0]["runs"]
    assert theirs["seconds"] == [4.0, 4.4, 4.2]
    assert "ratio" not in theirs
    assert ours["ratio"]["samples"] == pytest.approx([2.0, 4.4 / 2.1, 4.2 / 2.2])
    assert ours["ratio"]["median"] == 2.0
    assert ours["median"] == 2.1
    assert ours["fraction_of_limit"] == pytest.approx(0.5 / 2.1)
    assert ours["bytes_per_second"] == pytest.approx(1e9 / 2.1)
    assert ours["flops_per_second"] == pytest.approx(4e9 / 2.1)


def test_the_table_is_aligned_and_a_failed_cell_has_no_times() -> None:
    lines = SUITE.table(made_up_record(failed=True)).splitlines()
    head, *rows = lines[3:]
    assert "50.0 GB/s from 1 MiB" in lines[1]
    assert [row.split()[3] for row in rows] == ["theirs", "torch", "torch", "FAILED"]
    for column in ("seconds", "n", "faster", "of limit"):
        end = head.index(f" {column}") + 1 + len(column)
        assert all(row[end - 1] != " " and row[end : end + 1] in ("", " ") for row in rows), column
    assert rows[1].split()[4:8] == ["2.1", "2.04-2.16", "3", "2.00x"]
    assert rows[3].split()[4:11] == ["-"] * 7
    assert rows[3].endswith("torch: not finite")


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.json"
    record.write(made_up_record(failed=True), path)
    assert record.read(path) == made_up_record(failed=True)
    with pytest.raises(ValueError, match="JSON"):
        record.write({"error": float("nan")}, path)


def test_the_picture_has_a_bar_for_each_run() -> None:
    made = made_up_record(failed=True)
    figure = picture(made)
    above, below = figure.axes
    runs = made["cells"][0]["runs"]
    for axes, wanted in (
        (above, [run["ratio"]["median"] for run in runs[1:]]),
        (below, [100 * run["fraction_of_limit"] for run in runs]),
    ):
        bars = axes.patches
        assert [bar.get_height() for bar in bars] == pytest.approx(wanted)
        assert all(a.get_x() + a.get_width() <= b.get_x() for a, b in itertools.pairwise(bars))  # side by side
        assert bars[0].get_x() > -0.5  # about their cell
        assert bars[-1].get_x() + bars[-1].get_width() < 0.5
    said = [text.get_text() for text in above.texts]
    assert said == ["2.00×", "4.20×", "check\nfailed"]
    assert [text.get_text() for text in below.get_xticklabels()][1] == "model m\nbatch 64\nguidance 2"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["theirs", "torch", "torch compiled"]


def test_show_draws_a_finished_run_again(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    record.write(made_up_record(), path)
    result = bench("show", path)
    assert result.exit_code == 0, result.output
    assert SUITE.table(made_up_record()) in result.output
    assert path.with_suffix(".png").stat().st_size > 0
    for text in ("{", "[]", '{"cells": []}', '{"cells": [{}]}'):
        path.write_text(text)
        result = bench("show", path)
        assert result.exit_code == 2
        assert "not a record of this bench" in result.output


def test_the_machine_is_described_without_its_name_or_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    described = machine.describe(machine.CPU)
    assert described["torch"] == torch.__version__
    assert described["logical_cores"] >= 1
    text = json.dumps(described)
    assert str(Path.cwd()) not in text
    assert str(machine.ROOT) not in text
    monkeypatch.setattr(platform, "node", lambda: pytest.fail("asked for the machine's name"))
    machine.describe(machine.CPU)


def test_a_copy_without_git_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.commit() == {"commit": None, "dirty": None}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.commit() == {"commit": None, "dirty": None}


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


def chosen(suite: Any, **options: Any) -> Any:
    """The suite with what its options are by default, or these."""
    command = suite.command()
    context = command.make_context(suite.name, ["--ml-tarflow", str(machine.ROOT)])
    made = copy.copy(suite)
    made.chosen = SimpleNamespace(**{**context.params, **options})
    return made


def test_cases() -> None:
    cases = chosen(SUITE, configs=("medium", "tiny", "medium"), batches=(3,)).cases()
    assert [case.label for case in cases] == [
        {"model": "medium", "batch": 3, "guidance": 0.0},
        {"model": "tiny", "batch": 3, "guidance": 0.0},
        {"model": "tiny", "batch": 3, "guidance": 2.0},
    ]
    assert len(chosen(SUITE).cases()) == 8
    assert len({tuple(case.label.values()) for case in chosen(CPU).cases()}) == 12
    sizes = SIZES["medium"]
    assert (sizes.channels, sizes.layers_per_block, sizes.num_blocks, sizes.num_patches) == (256, 4, 4, 256)


def check(candidates: dict[str, Any]) -> Any:
    return admit_all({name: lambda run=run: run for name, run in candidates.items()})[1]


def test_the_check_is_against_the_first_and_at_the_tolerance() -> None:
    zero = torch.zeros(2, 1, 4, 4)
    near, far = zero + 0.9 * TOLERANCE, zero.clone()
    far[1, 0, 3, 3] = -1.1 * TOLERANCE

    def overflow() -> torch.Tensor:
        raise NonFiniteError(1, 2, 3)

    assert check({"a": lambda: zero, "b": lambda: near})["passed"]
    verdict = check({"a": lambda: zero, "b": lambda: near, "c": lambda: far})
    assert not verdict["passed"]
    assert verdict["max_error"] == pytest.approx(1.1 * TOLERANCE)
    for bad in (lambda: zero / 0, lambda: zero[:1], overflow):
        for candidates in ({"a": lambda: zero, "b": bad}, {"a": bad, "b": lambda: zero}):
            verdict = check(candidates)
            assert not verdict["passed"]
            assert verdict["max_error"] is None
            assert verdict["reason"]


def test_peers_end_to_end(tmp_path: Path, quick: None) -> None:
    threads = torch.get_num_threads()
    out = tmp_path / "run.json"
    result = peers(stand_in(tmp_path), out, "--threads", str(threads + 1), "--batch", "3")
    assert result.exit_code == 0, result.output
    assert torch.get_num_threads() == threads
    made = record.read(out)
    assert made["settings"]["threads"] == threads + 1
    assert [(cell["label"]["batch"], cell["label"]["guidance"]) for cell in made["cells"]] == [(3, 0), (3, 2)]
    seen = sys.modules["ml_tarflow_transformer_flow"].seen
    assert seen == [(3, True, 0.0)] * 4 + [(3, True, 2.0)] * 4  # the check, and three rounds
    unguided, guided = (cell["work"]["flops"] for cell in made["cells"])
    assert guided == 2 * unguided
    for cell in made["cells"]:
        assert cell["check"]["passed"]
        assert 0 < cell["check"]["max_error"] <= TOLERANCE
        assert [run["name"] for run in cell["runs"]] == ["ml-tarflow", "torch"]
        assert all(len(run["seconds"]) == 3 for run in cell["runs"])
        assert all(run["fraction_of_limit"] > 0 for run in cell["runs"])
        assert cell["runs"][1]["ratio"]["median"] > 0
    assert SUITE.table(made) in result.output
    with Image.open(out.with_suffix(".png")) as image:
        image.verify()
    assert str(tmp_path) not in out.read_text()
    assert str(machine.ROOT) not in out.read_text()


def test_peers_says_when_the_budget_allowed_fewer_samples(tmp_path: Path, quick: None) -> None:
    out = tmp_path / "run.json"
    assert peers(stand_in(tmp_path), out, "--budget", "1e-9").exit_code == 0
    made = record.read(out)
    assert made["settings"]["repeat"] == 3
    assert all(len(run["seconds"]) == 1 for cell in made["cells"] for run in cell["runs"])


@pytest.mark.parametrize("spoil", ["a little off", "nan", "shape"])
def test_peers_fails_without_a_time_when_results_differ(tmp_path: Path, quick: None, spoil: str) -> None:
    out = tmp_path / "run.json"
    result = peers(stand_in(tmp_path, spoil), out)
    assert result.exit_code == 1
    assert "2 of 2 checks failed" in result.output
    rows = [line for line in result.output.splitlines() if line.startswith("tiny")]
    assert len(rows) == 2
    assert all("FAILED" in row and row.split()[4:11] == ["-"] * 7 for row in rows)
    assert all(not cell["runs"] and not cell["check"]["passed"] for cell in record.read(out)["cells"])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "there is no transformer_flow.py"),
        ("x = 1", "no class Model"),
        ("class Model: pass", "no class Model with a reverse"),
        ("import nothing_of_this_name", "cannot be imported"),
        ("def", "cannot be imported"),
    ],
)
def test_peers_wants_a_checkout_of_the_published_code(tmp_path: Path, source: str | None, message: str) -> None:
    if source is not None:
        (tmp_path / "transformer_flow.py").write_text(source)
    result = peers(tmp_path, tmp_path / "run.json")
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
    assert not (tmp_path / "run.json").exists()


def test_wrong_usage_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path)
    assert peers(tmp_path / "missing", tmp_path / "run.json").exit_code == 2
    assert peers(tmp_path, tmp_path / "run.txt").exit_code == 2
    assert peers(tmp_path, tmp_path / "run.json", "--batch", "0").exit_code == 2
    monkeypatch.setattr("bench.common.plot.importlib.util.find_spec", lambda name: None)
    result = peers(tmp_path, tmp_path / "run.json")
    assert result.exit_code == 1
    assert "tarflow_fast[bench]" in result.output


def test_help_is_worth_reading() -> None:
    for arguments in (["--help"], ["peers", "--help"], ["show", "--help"]):
        assert bench(*arguments).exit_code == 0
    assert "--ml-tarflow" in bench("--help").output


@pytest.mark.skipif(cpu_missing() is not None, reason=str(cpu_missing()))
def test_cpu_end_to_end(tmp_path: Path, quick: None) -> None:
    out = tmp_path / "run.json"
    arguments = ("--config", "tiny", "--batch", "2", "--threads", "1", "--repeat", "2", "--out", out)
    result = bench("cpu", "--ml-tarflow", stand_in(tmp_path), *arguments)
    assert result.exit_code == 0, result.output
    made = record.read(out)
    fp32, bf16 = made["cells"]
    assert (fp32["label"]["dtype"], bf16["label"]["dtype"]) == ("float32", "bfloat16")
    assert bf16["work"]["bytes"] * 2 == fp32["work"]["bytes"]
    assert fp32["check"]["tolerance"] == TOLERANCE < bf16["check"]["max_error"] <= bf16["check"]["tolerance"]
    for cell in made["cells"]:
        assert [run["name"] for run in cell["runs"]] == ["ml-tarflow", "torch", "cpu"]


@pytest.mark.slow
def test_peers_times_the_compiled_sampler_too(tmp_path: Path, quick: None) -> None:
    out = tmp_path / "run.json"
    result = peers(stand_in(tmp_path), out, "--compile")
    assert result.exit_code == 0, result.output
    assert [run["name"] for run in record.read(out)["cells"][0]["runs"]] == ["ml-tarflow", "torch", "torch compiled"]
