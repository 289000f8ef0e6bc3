"""`bench auto`: who is run, checked, timed and judged, and the suite end to end on a tiny model with made-up times."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import random_model
from click.testing import Result
from PIL import Image
from stand_in import bench
from tolerances import assert_close

import tarflow_fast
from bench.common import harness, machine, record
from bench.common import suite as common
from bench.common.harness import Rounds
from bench.suites import auto as auto_cases
from bench.suites.auto import BOUND, MOST_RUNS, SUITE, Candidate, Problem, costs_of, judge, measure, try_windows
from tarflow_fast import solvers
from tarflow_fast.engine import BlockEngine, BlockState
from tarflow_fast.solvers import Costs, Solution, adaptive, sequential

CPU = torch.device("cpu")
WINDOWS = ["window 2", "window 4", "window 8", "window 15"]
NAMES = ["sequential", *WINDOWS, "auto"]
TIMES = dict(zip(NAMES, (3.0, 2.5, 2.0, 2.2, 9.0, 1.9), strict=True)) | {"auto with plan": 1.0}


def problem_of(dtype: str = "float32", batch: int = 4, spoil: float = 1.0) -> Problem:
    """T = 16, K = 2."""
    model = random_model(3, num_classes=2)
    with torch.no_grad():
        model.blocks[1].proj_out.weight.mul_(spoil)
    return Problem("tiny", model, dtype, batch, "torch", CPU, 5)


def pair_of(problem: Problem) -> tuple[Candidate, Candidate]:
    """Auto, and sequential with its engines; neither was run."""
    sampler = Candidate("auto", problem, problem.sampler("auto"))
    return sampler, sampler.other("sequential", [sequential, sequential])


class Flat:
    """A cost table in which no pass costs more than a step, so that no window is hopeless before it was run."""

    def of(self, engine: BlockEngine, state: BlockState) -> Costs:
        return Costs(1.0, {2: 1.0, 15: 1.0})


def fake_times(monkeypatch: pytest.MonkeyPatch, times: dict[str, float]) -> list[str]:
    """Make runs take so many seconds, first runs and rounds. Returns a list of the rounds' runs as they come."""
    timed: list[str] = []
    run = Candidate.run

    def first(self: Candidate, wanted: torch.Tensor, allowed: float) -> bool:
        passed = run(self, wanted, allowed)
        if passed:
            self.seconds[-1] = times[self.name]
        return passed

    def timer(run: Any) -> float:
        run()
        timed.append(run.__self__.name)
        return times[timed[-1]]

    monkeypatch.setattr(Candidate, "run", first)
    monkeypatch.setattr(harness, "timer_of", lambda device: timer)
    monkeypatch.setattr(auto_cases, "CostTable", Flat)
    monkeypatch.setattr(harness, "REST", 0.0)
    return timed


def measured(monkeypatch: pytest.MonkeyPatch, times: dict[str, float], problem: Problem | None = None) -> Any:
    fake_times(monkeypatch, times)
    return measure(problem or problem_of(), Rounds(3, 99.0))


# Who takes part


def test_latents_and_labels_are_those_of_sample() -> None:
    problem = problem_of(batch=5)
    z, y = problem.inputs
    assert y is not None
    assert y.tolist() == [0, 1, -1, 0, 1]
    sampler, baseline = pair_of(problem)
    for candidate in (sampler, baseline):
        assert torch.allclose(candidate.sample(), candidate.reverse(), rtol=0, atol=BOUND)
    assert torch.equal(baseline.sample(), baseline.reverse())
    assert torch.equal(baseline.sample(), problem.sampler("sequential").reverse(z, y))


def test_a_fixed_window_is_that_of_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_times(monkeypatch, TIMES)
    problem = problem_of()
    wanted, allowed = problem.yardstick()
    sampler, baseline = pair_of(problem)
    assert baseline.run(wanted, allowed)
    assert baseline.error == 0.0
    assert baseline.windows() == [1, 1]
    windows, not_run = try_windows(baseline, Costs(1.0, {2: 1.0}), wanted, allowed)
    assert not_run == []
    assert [candidate.name for candidate in windows] == WINDOWS
    assert [candidate.windows() for candidate in windows] == [[2, 2], [4, 4], [8, 8], [15, 15]]
    for candidate in windows:
        assert candidate.sampler.engines == sampler.sampler.engines
        assert candidate.error == float((candidate.sample() - wanted).abs().max()) > 0
        assert candidate.run(wanted + 0.5 * allowed, allowed)
        error = candidate.error
        assert candidate.run(wanted, allowed)
        assert error == candidate.error > 0.4 * allowed  # the larger one
        assert not candidate.run(wanted + 2 * allowed, allowed)
    assert sampler.sampler.solvers != baseline.sampler.solvers
    assert sampler.report is None  # it has learnt nothing from the others


def test_in_bf16_what_rounding_makes_of_the_sequential_result_is_allowed_twice() -> None:
    """Of sixteen images, of however many a batch has."""
    problem = problem_of("bfloat16")
    wanted, allowed = replace(problem, batch=16).yardstick()
    exact = replace(problem, batch=16, dtype="float32").yardstick()[0]
    off = float((wanted - exact).abs().max())
    assert off > 0
    assert allowed == pytest.approx(2 * off + 2**-8 * float(wanted.abs().max()))
    few, again = problem.yardstick()
    assert_close(few, wanted[: problem.batch], 1e-3)
    assert again == allowed
    assert problem_of().yardstick()[1] == BOUND


@pytest.mark.parametrize(
    ("choices", "runs", "settled"),
    [
        ([[1, 2], [1, 2]], 2, True),
        ([[1, 2], [2, 2], [1, 2], [1, 4], [1, 4], [8, 8]], 5, True),
        ([[1, n] for n in range(99)], MOST_RUNS, False),
    ],
)
def test_auto_has_settled_when_two_runs_in_a_row_choose_the_same(
    choices: list[list[int]], runs: int, settled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler, _ = pair_of(problem_of())
    coming = iter(choices)
    monkeypatch.setattr(Candidate, "windows", lambda self: next(coming))
    found = sampler.settle(*sampler.problem.yardstick())
    assert found["settled"] == settled
    assert [run["windows"] for run in found["runs"]] == choices[:runs]


# Hopeless windows


def tried(monkeypatch: pytest.MonkeyPatch, times: dict[str, float], costs: Costs) -> tuple[list[str], list[str]]:
    """The windows that were run, once for each run, and those that were not."""
    problem = problem_of()
    wanted, allowed = problem.yardstick()
    fake_times(monkeypatch, times)
    _, baseline = pair_of(problem)
    baseline.run(wanted, allowed)
    windows, not_run = try_windows(baseline, costs, wanted, allowed)
    return [candidate.name for candidate in windows for _ in candidate.seconds], [out["name"] for out in not_run]


def test_a_window_that_would_be_slow_at_best_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    in_proportion = Costs(1.0, {2: 2.0, 4: 4.0})
    # 15 times the tokens, and 8 times: at best as slow as window 4, which took more than twice as long
    assert tried(monkeypatch, TIMES | {"window 4": 5.1}, in_proportion) == (WINDOWS[:2], WINDOWS[2:])
    assert tried(monkeypatch, TIMES | {"window 4": 4.9}, in_proportion) == (WINDOWS, [])
    # passes that cost no more with the width: half of what window 4 took
    assert tried(monkeypatch, TIMES | {"window 4": 5.1}, Costs(1.0, {2: 1.0, 15: 1.0})) == (WINDOWS, [])
    # from window 2 on in proportion
    assert tried(monkeypatch, TIMES | {"window 2": 9.0}, Costs(1.0, {2: 1.0, 4: 2.0})) == (WINDOWS[:1], WINDOWS[1:])
    # a pass of two tokens that costs five steps, one of fifteen likewise
    assert tried(monkeypatch, TIMES, Costs(1.0, {2: 5.0, 4: 5.0, 15: 5.0})) == (WINDOWS[1:], WINDOWS[:1])


def test_a_run_that_is_over_at_once_is_done_whatever_is_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    short = {name: seconds / 1e3 for name, seconds in TIMES.items()}
    ran, not_run = tried(monkeypatch, short, Costs(1.0, {2: 50.0, 15: 50.0}))
    assert not_run == []
    assert ran == [*WINDOWS, "window 15"]  # 9 ms where the fastest takes 2: twice, in case that was a hiccup


def test_a_window_that_took_twice_as_long_is_not_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = measured(monkeypatch, TIMES)
    count = {run["name"]: len(run["seconds"]) for run in entry["runs"]}
    assert count == dict.fromkeys(NAMES, 3) | {"window 15": 1}
    slow = next(run for run in entry["runs"] if run["name"] == "window 15")
    assert slow["seconds"] == [9.0]
    assert "ratio" not in slow
    # auto may be quicker than all of them: that makes none of them hopeless
    entry = measured(monkeypatch, TIMES | {"auto": 0.1})
    assert sum(len(run["seconds"]) == 3 for run in entry["runs"]) == 5


def test_a_mistake_in_auto_s_costs_leaves_no_window_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solvers.auto, "measure", lambda *arguments: Costs(1.0, {2: 99.0, 15: 99.0}))
    entry = measured(monkeypatch, TIMES)
    assert entry["costs"][0]["passes"] == [(2, 99.0), (15, 99.0)]
    assert [run["name"] for run in entry["runs"]] == NAMES
    assert entry["not_run"] == []


# The verdict


def test_auto_is_judged_by_the_best_fixed_choice_round_by_round() -> None:
    samples = {
        "sequential": [4.0, 4.0, 4.0],
        "window 2": [1.0, 2.0, 6.0],
        "window 4": [3.0, 3.0, 3.0],
        "auto": [1.0, 2.2, 6.6],
        "auto with plan": [0.1, 0.1, 0.1],
    }
    found = judge(samples)
    assert found["best"] == "window 2"
    assert found["ratio"]["samples"] == [1.0, 2.0 / 2.2, 6.0 / 6.6]
    assert found["slower"] == pytest.approx(1.1)
    assert not found["met"]
    assert judge(samples | {"auto": [9.0, 2.1, 6.3]})["met"]  # exactly 1.05


def test_what_auto_chose_and_measured_is_in_the_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of()
    entry = measured(monkeypatch, TIMES, problem)
    assert [run["name"] for run in entry["runs"]] == NAMES
    for run in entry["runs"]:
        assert [sorted(block) for block in run["blocks"]] == [["evaluations", "passes", "residual", "window"]] * 2
        assert run["passes"] == sum(block["passes"] for block in run["blocks"])
        assert run["evaluations"] == sum(block["evaluations"] for block in run["blocks"]) / problem.batch
    chosen = [block["window"] for block in entry["runs"][-1]["blocks"]]
    assert entry["settling"]["runs"][-1]["windows"] == chosen
    assert entry["first"] == entry["settling"]["runs"][0]["seconds"] / TIMES["sequential"]
    own, again = entry["costs"]
    assert own["token"] > 0
    assert [width for width, _ in own["passes"]] == [2, 4, 8, 15][: len(own["passes"])]
    assert again == {"token": 1.0, "passes": [(2, 1.0), (15, 1.0)]}
    assert entry["runs"][3]["ratio"]["samples"] == [3.0 / 2.2] * 3
    assert (entry["verdict"]["best"], entry["verdict"]["slower"]) == ("window 4", pytest.approx(0.95))


def test_costs_are_auto_s_own_and_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, _ = pair_of(problem_of())
    sampler.sample()
    known = sampler.sampler.solvers[0].costs  # type: ignore[attr-defined]
    (own,) = known._costs.values()
    found, again = costs_of(sampler)
    assert found is own
    assert again is not own
    assert list(known._costs.values()) == [own]


# The suite


def suite(tmp_path: Path, *more: str | Path, spoil: float = 1.0) -> tuple[Result, Path]:
    problem, out = problem_of(spoil=spoil), tmp_path / "run.json"
    tarflow_fast.save(problem.model, tmp_path / "tiny.safetensors")
    arguments = ("--batch", "4", "--repeat", "2", "--backend", "torch")
    return bench("auto", "--model", tmp_path / "tiny.safetensors", *arguments, "--out", out, *more), out


@pytest.mark.slow
def test_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = fake_times(monkeypatch, TIMES)
    other = random_model(4, num_blocks=3)
    tarflow_fast.save(other, tmp_path / "other.safetensors")
    result, out = suite(tmp_path, "--model", tmp_path / "other.safetensors", "--batch", "1", "--plan", "2")
    assert result.exit_code == 0, result.output
    made = record.read(out)
    assert (made["suite"], made["failures"], made["limits"]) == ("auto", [], {})
    assert made["settings"]["plan_images"] == 2
    assert [tuple(cell["label"].values()) for cell in made["cells"]] == [
        (f"{model}.safetensors", dtype, batch)
        for model in ("tiny", "other")
        for dtype in ("float32", "bfloat16")
        for batch in (4, 1)
    ]
    assert timed[:12] == [*NAMES[:4], "auto", "auto with plan"] * 2
    for cell in made["cells"]:
        assert cell["check"]["passed"]
        assert cell["check"]["max_error"] <= cell["check"]["tolerance"]
        assert cell["backend"] == "torch"
        assert [run["name"] for run in cell["runs"]] == [*NAMES, "auto with plan"]
        assert len(cell["runs"][0]["blocks"]) == (2 if cell["label"]["model"] == "tiny.safetensors" else 3)
        assert cell["verdict"]["best"] == "window 4"
        assert cell["verdict"]["ratio"]["samples"] == [2.0 / 1.9] * 2
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
    assert not cell["verdict"]["met"]
    assert cell["verdict"]["ratio"]["samples"] == [2.0 / 2.2] * 2
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
    assert [left["name"] for left in cell["left_out"]] == ["window 4"]
    assert "differs by" in cell["check"]["reason"]
    assert "window 4" not in [run["name"] for run in cell["runs"]]
    assert timed == ["sequential", "window 2", "window 8", "auto"] * 2
    assert cell["verdict"]["best"] == "window 8"
    assert bench("show", out).exit_code == 0


@pytest.mark.parametrize("who", ["sequential", "auto"])
def test_without_sequential_or_auto_nothing_is_timed(who: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = fake_times(monkeypatch, TIMES)
    sample: Callable[[Candidate], torch.Tensor] = Candidate.sample
    monkeypatch.setattr(Candidate, "sample", lambda self: sample(self) + (2 * BOUND if self.name == who else 0))
    result, out = suite(tmp_path, "--dtype", "float32")
    assert result.exit_code == 1
    (cell,) = record.read(out)["cells"]
    assert not cell["check"]["passed"]
    assert [left["name"] for left in cell["left_out"]] == [who]
    assert cell["verdict"] is None
    assert timed == []
    assert bench("show", out).exit_code == 0


def test_a_model_that_overflows_fails_with_a_record(tmp_path: Path) -> None:
    result, out = suite(tmp_path, spoil=1e4)
    assert result.exit_code == 1
    assert "2 of 2 checks failed" in result.output
    for cell in record.read(out)["cells"]:
        assert cell["runs"] == []
        assert "sequential: " in cell["check"]["reason"]
    assert bench("show", out).exit_code == 0


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
    assert bench("auto", "--plan", "1").exit_code == 2
    same = tmp_path / "more"
    same.mkdir()
    (same / "tiny.safetensors").touch()
    result, out = suite(tmp_path, "--model", same / "tiny.safetensors")
    assert result.exit_code == 2
    assert "names" in result.output
    result, out = suite(tmp_path, "--backend", "none")
    assert result.exit_code == 1
    assert "backend: expected one of" in result.output
    assert not out.exists()
    assert "window W" in bench("auto", "--help").output
