"""`bench peers` and `bench cpu`: their cases, and both end to end against a stand-in."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import Result
from PIL import Image
from stand_in import bench, quick_limits, stand_in

from bench.common import gemm, machine, record
from bench.common.harness import TOLERANCE, Case
from bench.suites.peers import SIZES, SUITES
from tarflow_fast.backend.cpu.engine import cpu_missing
from tarflow_fast.native import choose_instruction_set, instruction_sets

SUITE, ON_CPU = SUITES


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick_limits(monkeypatch)


def peers(checkout: Path, out: Path, *more: str) -> Result:
    return bench("peers", "--ml-tarflow", checkout, "--config", "tiny", "--repeat", "3", "--out", out, *more)


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
    assert len(chosen(SUITE).cases()) == 9
    assert len({tuple(case.label.values()) for case in chosen(ON_CPU).cases()}) == 12
    sizes = SIZES["medium"]
    assert (sizes.channels, sizes.layers_per_block, sizes.num_blocks, sizes.num_patches) == (256, 4, 4, 256)


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
        assert cell["label"]["isa"] == choose_instruction_set()
        assert cell["gemm"]["seconds"] > 0
    assert result.output.count("torch's products, model tiny, batch 2, ") == 2
    assert made["settings"]["instruction_set"] == choose_instruction_set()
    for cell in made["cells"]:
        del cell["gemm"], cell["label"]["isa"]  # an older record is shown as it was
    assert "torch's products" not in ON_CPU.table(made)


@pytest.mark.skipif(cpu_missing() is not None, reason=str(cpu_missing()))
def test_every_instruction_set_is_a_case_of_its_own() -> None:
    sets = instruction_sets()
    command = ON_CPU.command()
    context = command.make_context("cpu", ["--isa", "all", "--isa", sets[0], "--batch", "2", "--config", "tiny"])
    suite = chosen(ON_CPU, **context.params)
    assert [case.label["isa"] for case in suite.cases() if case.dtype == "float32"] == sets
    shown = bench("cpu", "--explain", "--isa", sets[0], "--config", "tiny", "--dtype", "float32", "--threads", "1")
    assert f", {sets[0]}, one block" in shown.output
    assert bench("cpu", "--isa", "sse9", "--explain").exit_code == 1


@pytest.mark.skipif(cpu_missing() is not None, reason=str(cpu_missing()))
def test_explain_tells_what_was_chosen_and_needs_no_checkout(quick: None) -> None:
    result = bench("cpu", "--explain", "--config", "tiny", "--batch", "3", "--dtype", "float32", "--threads", "1")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("caches (")
    for part in ("1 team of 1 thread; groups of up to 3 rows", "GFLOP/s expected", "attention: ", "barriers: 0 s"):
        assert part in result.output
    assert bench("cpu", "--config", "tiny").exit_code == 2


def test_the_rate_of_products_counts_every_operation(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "product_rate", lambda rows, k, columns, dtype: 1.0)
    sizes = SIZES["tiny"]
    case = Case({"batch": 5}, sizes)
    steps = sizes.num_blocks * (sizes.num_patches - 1) * sizes.layers_per_block
    flops = 24 * 5 * sizes.channels**2
    assert gemm.limit(case, torch.float32) == {"seconds": steps * flops, "flops_per_second": 1.0}


@pytest.mark.slow
def test_peers_times_the_compiled_sampler_too(tmp_path: Path, quick: None) -> None:
    out = tmp_path / "run.json"
    result = peers(stand_in(tmp_path), out, "--compile")
    assert result.exit_code == 0, result.output
    assert [run["name"] for run in record.read(out)["cells"][0]["runs"]] == ["ml-tarflow", "torch", "torch compiled"]
