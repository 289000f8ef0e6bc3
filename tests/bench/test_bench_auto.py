"""`bench auto`: who is run, checked, timed and judged, and the suite end to end on a tiny model with made-up times."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import random_model
from click.testing import Result
from PIL import Image
from stand_in import bench

import tarflow_fast
from bench.common import harness, machine, models, record
from bench.common import suite as common
from bench.common.harness import Case
from bench.suites import auto as auto_cases
from bench.suites.auto import BOUND, SETTLE, SUITE, judge
from tarflow_fast import Sampler
from tarflow_fast.engine import BlockEngine, BlockState
from tarflow_fast.solvers import Auto, Solution, adaptive, sequential

CPU = torch.device("cpu")
WINDOWS = ["window 2", "window 4", "window 8", "window 15"]
NAMES = ["sequential", *WINDOWS, "auto"]
TIMES = dict(zip(NAMES, (3.0, 2.5, 2.0, 2.2, 9.0, 1.9), strict=True))


def model_of(spoil: float = 1.0) -> tarflow_fast.TarFlow:
    """T = 16, K = 2."""
    model = random_model(3, num_classes=2)
    with torch.no_grad():
        model.blocks[1].proj_out.weight.mul_(spoil)
    return model


def name_of(sampler: Sampler) -> str:
    solver: Any = sampler.solvers[0]
    if isinstance(solver, Auto):
        return "auto"
    return "sequential" if solver is sequential else f"window {solver.keywords['window']}"


def fake_times(monkeypatch: pytest.MonkeyPatch, times: dict[str, float]) -> list[str]:
    """Make runs take so many seconds, first runs and rounds. Returns a list of the rounds' runs as they come."""
    timed: list[str] = []
    report_of = auto_cases.report_of

    def report(sampler: Sampler, *how: Any) -> Any:
        return replace(report_of(sampler, *how), seconds=times[name_of(sampler)], setup_seconds=0.0)

    def timer(run: Any) -> float:
        run()
        if not hasattr(run, "func"):  # the check
            return 0.0
        timed.append(name_of(run.func.__self__))
        return times[timed[-1]]

    monkeypatch.setattr(auto_cases, "report_of", report)
    monkeypatch.setattr(harness, "timer_of", lambda device: timer)
    monkeypatch.setattr(harness, "REST", 0.0)
    return timed


def suite_of(model: tarflow_fast.TarFlow) -> Any:
    made = copy.copy(SUITE)
    made.models = {"tiny": model}
    made.chosen = SimpleNamespace(backend="torch", seed=5, repeat=3, budget_seconds=99.0)
    return made


def case_of(dtype: str = "float32", batch: int = 4) -> Case:
    return Case({"model": "tiny", "dtype": dtype, "batch": batch}, model_of().config, dtype=dtype)


def measured(monkeypatch: pytest.MonkeyPatch, times: dict[str, float]) -> Any:
    fake_times(monkeypatch, times)
    return suite_of(model_of()).measure(case_of())


# Who takes part


def test_latents_and_labels_are_those_of_sample() -> None:
    model = model_of()
    z, y = models.inputs(model.config, 5, 7, none=True)
    assert y is not None
    assert y.tolist() == [0, 1, -1, 0, 1]
    sampler = Sampler(model, backend="torch", solver="sequential")
    assert torch.equal(sampler.sample(5, y, seed=7).images, sampler.reverse(z, y))


def test_a_fixed_window_is_that_of_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, tuple[list[int], Any]] = {}
    fake_times(monkeypatch, TIMES)
    report_of = auto_cases.report_of

    def watched(sampler: Sampler, *how: Any) -> Any:
        report = report_of(sampler, *how)
        seen[name_of(sampler)] = [block.window for block in report.blocks], sampler.engines
        return report

    monkeypatch.setattr(auto_cases, "report_of", watched)
    cell = suite_of(model_of()).measure(case_of())
    assert {name: windows for name, (windows, _) in seen.items() if name != "auto"} == {
        "sequential": [1, 1],
        **{name: [int(name.split()[1])] * 2 for name in WINDOWS},
    }
    assert all(engines is seen["auto"][1] for _, engines in seen.values())
    errors = {run["name"]: run["max_error"] for run in cell["runs"]}
    assert errors["sequential"] == 0.0 < errors["window 2"] <= BOUND


@pytest.mark.slow
def test_in_bf16_what_rounding_makes_of_the_sequential_result_is_allowed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_times(monkeypatch, TIMES)
    suite, case = suite_of(model_of()), case_of("bfloat16")
    z, y = models.inputs(case.sizes, 4, 5, none=True)
    exact, wanted = (suite.sampler(model_of(), dtype, "sequential").reverse(z, y) for dtype in ("float32", "bfloat16"))
    off = float((wanted - exact).abs().max())
    assert off > 0
    check = suite.measure(case)["check"]
    assert check["tolerance"] == pytest.approx(2 * off + 2**-8 * float(exact.abs().max()))
    assert suite.measure(case_of())["check"]["tolerance"] == BOUND


@pytest.mark.slow
def test_a_window_that_took_twice_as_long_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = measured(monkeypatch, TIMES)
    assert [(run["name"], len(run["seconds"])) for run in entry["runs"]] == [
        (name, 3) for name in NAMES if name != "window 15"
    ]
    assert entry["left_out"] == [{"name": "window 15", "reason": "takes 4.5 times as long as the fastest"}]
    assert entry["check"]["passed"]
    # of two runs the quicker one counts
    slow = iter([9.0, 2.2] * 9)
    fake_times(monkeypatch, TIMES)
    report_of = auto_cases.report_of

    def hiccup(sampler: Sampler, *how: Any) -> Any:
        report = report_of(sampler, *how)
        return replace(report, seconds=next(slow)) if name_of(sampler) == "window 8" else report

    with monkeypatch.context() as context:
        context.setattr(auto_cases, "report_of", hiccup)
        assert "window 8" in [run["name"] for run in suite_of(model_of()).measure(case_of())["runs"]]
    # auto may be quicker than all of them: that makes none of them hopeless
    entry = measured(monkeypatch, TIMES | {"auto": 0.1})
    assert len(entry["runs"]) == 5


# The verdict


def test_auto_is_judged_by_the_best_fixed_choice_round_by_round() -> None:
    def of(auto: list[float]) -> Any:
        samples = {
            "sequential": [4.0, 4.0, 4.0],
            "window 2": [1.0, 2.0, 6.0],
            "window 4": [3.0, 3.0, 3.0],
            "auto": auto,
        }
        settling = {"runs": [{"seconds": 6.0, "windows": [2, 1]}, {"seconds": 2.0, "windows": [4, 1]}]}
        return judge({"runs": harness.runs_of(samples), "settling": settling})

    found = of([1.0, 2.2, 6.6])
    assert (found["best"], found["first"], found["windows"]) == ("window 2", 1.5, "1 4")
    assert found["samples"] == [1.0, 2.2 / 2.0, 6.6 / 6.0]
    assert (found["median"], found["rule"]) == (pytest.approx(1.1), "FAILED")
    assert of([9.0, 2.1, 6.3])["rule"] == "met"  # exactly 1.05


def test_what_auto_chose_is_in_the_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = measured(monkeypatch, TIMES)
    passes = {run["name"]: (run["passes"], run["evaluations"]) for run in entry["runs"]}
    assert passes["sequential"] == (30, 30)
    assert all(4 <= passes[name][0] <= 30 <= passes[name][1] for name in WINDOWS[:3])
    assert [(run["seconds"], len(run["windows"])) for run in entry["settling"]["runs"]] == [(1.9, 2)] * SETTLE
    found = judge(entry)
    assert found is not None
    assert (found["best"], found["median"], found["first"]) == ("window 4", pytest.approx(0.95), 1.9 / 3.0)


# The suite


def suite(tmp_path: Path, *more: str | Path, spoil: float = 1.0) -> tuple[Result, Path]:
    out = tmp_path / "run.json"
    tarflow_fast.save(model_of(spoil), tmp_path / "tiny.safetensors")
    arguments = ("--batch", "4", "--repeat", "2", "--backend", "torch")
    return bench("auto", "--model", tmp_path / "tiny.safetensors", *arguments, "--out", out, *more), out


@pytest.mark.slow
def test_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = fake_times(monkeypatch, TIMES)
    other = random_model(4, num_blocks=3)
    tarflow_fast.save(other, tmp_path / "other.safetensors")
    result, out = suite(tmp_path, "--model", tmp_path / "other.safetensors", "--batch", "1")
    assert result.exit_code == 0, result.output
    made = record.read(out)
    assert (made["suite"], made["failures"], made["limits"]) == ("auto", [], {})
    assert [tuple(cell["label"].values()) for cell in made["cells"]] == [
        (f"{model}.safetensors", dtype, batch)
        for model in ("tiny", "other")
        for dtype in ("float32", "bfloat16")
        for batch in (4, 1)
    ]
    assert timed[:10] == [*NAMES[:4], "auto"] * 2
    for cell in made["cells"]:
        assert cell["check"]["passed"]
        assert cell["check"]["max_error"] <= cell["check"]["tolerance"]
        assert cell["backend"] == "torch"
        assert [run["name"] for run in cell["runs"]] == [*NAMES[:4], "auto"]
    table = SUITE.table(made)
    assert table in result.output
    lines = [line.split() for line in table.splitlines()]
    assert ["tiny.safetensors", "float32", "4", "window", "4"] in [line[:5] for line in lines]
    verdicts = [line for line in lines if line[-1:] == ["met"]]
    assert [line[3:6] for line in verdicts] == [["window", "4", "0.950"]] * 8
    with Image.open(out.with_suffix(".png")) as image:
        image.verify()
    assert str(tmp_path) not in out.read_text()
    assert str(machine.ROOT) not in out.read_text()
    shown = bench("show", out)
    assert shown.exit_code == 0, shown.output
    assert table in shown.output


def test_a_slow_auto_is_a_failure_with_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_times(monkeypatch, TIMES | {"auto": 2.2})
    result, out = suite(tmp_path, "--dtype", "float32")
    assert result.exit_code == 1
    made = record.read(out)
    (cell,) = made["cells"]
    assert cell["check"]["passed"]
    line = "model tiny.safetensors, dtype float32, batch 4: auto takes 1.100 times as long as window 4, allowed 1.05"
    assert made["failures"] == [line]
    assert f"FAILED {line}" in result.output
    assert bench("show", out).exit_code == 0


def off(engine: BlockEngine, state: BlockState, *rest: Any, **options: Any) -> Solution:
    """Adaptive, but window 4's last token is off by more than is allowed."""
    solution = adaptive(engine, state, *rest, **options)
    if options["window"] == 4:
        state.x[-1, -1] += 2 * BOUND
    return solution


def test_a_window_that_is_off_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = fake_times(monkeypatch, TIMES)
    monkeypatch.setattr(auto_cases, "adaptive", off)
    result, out = suite(tmp_path, "--dtype", "float32")
    assert result.exit_code == 1
    assert "1 of 1 checks failed" in result.output
    (cell,) = record.read(out)["cells"]
    assert [left["name"] for left in cell["left_out"]] == ["window 4", "window 15"]
    assert "differs by" in cell["check"]["reason"]
    assert "window 4" not in [run["name"] for run in cell["runs"]]
    assert timed == ["sequential", "window 2", "window 8", "auto"] * 2
    found = judge(cell)
    assert found is not None
    assert found["best"] == "window 8"
    assert bench("show", out).exit_code == 0


@pytest.mark.parametrize("who", ["sequential", "auto"])
def test_without_sequential_or_auto_there_is_no_verdict(
    who: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = fake_times(monkeypatch, TIMES)
    reverse, calls = Sampler.reverse, list[str]()

    def wrong(self: Sampler, *how: Any) -> Any:
        calls.append(name_of(self))
        first = len(calls) == 1  # what the others are held to
        return reverse(self, *how) + (2 * BOUND if calls[-1] == who and not first else 0)

    monkeypatch.setattr(Sampler, "reverse", wrong)
    result, out = suite(tmp_path, "--dtype", "float32")
    assert result.exit_code == 1
    (cell,) = record.read(out)["cells"]
    assert not cell["check"]["passed"]
    assert [left["name"] for left in cell["left_out"]] == [who, "window 15"]
    assert judge(cell) is None
    assert who not in timed
    assert (timed == []) == (who == "sequential")
    assert bench("show", out).exit_code == 0


def test_a_model_that_overflows_fails_with_a_record(tmp_path: Path) -> None:
    result, out = suite(tmp_path, spoil=1e4)
    assert result.exit_code == 1
    assert "2 of 2 checks failed" in result.output
    for cell in record.read(out)["cells"]:
        assert cell["runs"] == []
        assert "sequential: " in cell["check"]["reason"]
    assert bench("show", out).exit_code == 0


@pytest.mark.slow
def test_the_record_is_strict_json_also_between_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_times(monkeypatch, TIMES)
    found: list[int] = []
    monkeypatch.setattr(common, "write", lambda made, out: found.append(len(json.dumps(made, allow_nan=False))))
    result, _ = suite(tmp_path)
    assert result.exit_code == 0, result.output
    assert len(found) == 3  # after each cell, and of the whole
    assert found[0] < found[1] <= found[2]


def test_wrong_usage(tmp_path: Path) -> None:
    assert bench("auto", "--model", tmp_path / "missing.pth").exit_code == 2
    assert bench("auto", "--batch", "0").exit_code == 2
    assert bench("auto", "--dtype", "int8").exit_code == 2
    same = tmp_path / "more"
    same.mkdir()
    tarflow_fast.save(model_of(), same / "tiny.safetensors")
    result, out = suite(tmp_path, "--model", same / "tiny.safetensors")
    assert result.exit_code == 2
    assert "names" in result.output
    result, out = suite(tmp_path, "--backend", "none")
    assert result.exit_code == 1
    assert "backend: expected one of" in result.output
    assert not out.exists()
    assert "window W" in bench("auto", "--help").output
