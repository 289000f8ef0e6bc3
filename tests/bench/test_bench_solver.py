"""`bench solver`: the published policies' laws, its checks, and the suite end to end on a tiny model."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import random_latents, random_model
from click.testing import Result
from PIL import Image
from stand_in import bench
from tolerances import INVERSE_F64, SAME_F64, assert_close
from torch import Tensor

import tarflow_fast
from bench.common import machine, record
from bench.common.harness import Rounds
from bench.suites.solver import suite as solver_cases
from bench.suites.solver.baselines import CLAMP, gs_jacobi, jacobi, windows
from bench.suites.solver.suite import (
    BOUND,
    SUITE,
    Problem,
    candidates,
    examine,
    jacobi_errors,
    measure,
)
from tarflow_fast.backend import make_engines
from tarflow_fast.engine import BlockEngine, BlockState, Condition, Guidance
from tarflow_fast.engine.backend import Request
from tarflow_fast.solvers import Solution, Solver, adaptive

CPU = torch.device("cpu")
NAMES = ["sequential", "adaptive 0.01", "adaptive 0.001", "adaptive 0.0001"]
NAMES += ["all-Jacobi 0.5", "all-Jacobi 0.01", "all-Jacobi 0.001", "all-Jacobi 0.0001", "GS-Jacobi 4x2"]


def problem_of(scale: float = 1.0, condition: Condition = Condition()) -> Problem:  # noqa: B008
    """T = 16, in float64. scale: of the latents."""
    model = random_model(3, torch.float64, num_classes=2)
    weights = model.block_weights(1)
    engine = make_engines("torch", [weights], Request(CPU, torch.float64, False))[0]
    return Problem(1, engine, scale * random_latents(model, 3), condition)


def solved(problem: Problem, solver: Solver) -> tuple[Tensor, Solution, list[int]]:
    steps: list[int] = []
    state = problem.engine.begin(problem.z, problem.condition)
    solution = solver(problem.engine, state, steps.append)
    assert sum(steps) == problem.z.shape[1] - 1
    assert len(steps) == solution.passes
    return state.x, solution, steps


# The published policies


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize(
    ("solver", "passes", "evaluations"),
    [
        (functools.partial(jacobi, threshold=0.0), 15, 15 * 15),
        (functools.partial(gs_jacobi, segments=1, passes=15, clamp=math.inf), 15, 15 * 15),
        (functools.partial(gs_jacobi, segments=4, passes=99, clamp=math.inf), 15, 3 * 3 + 3 * 16 + 3 + 4 + 4),
        (functools.partial(gs_jacobi, segments=16, passes=1, clamp=math.inf), 15, 1 + 14 * 2),
    ],
)
def test_equal_to_sequential_after_as_many_passes_as_tokens(
    solver: Solver, passes: int, evaluations: int, guidance: float
) -> None:
    problem = problem_of(condition=Condition(torch.tensor([0, 1, -1]), Guidance(guidance)))
    x, solution, _ = solved(problem, solver)
    assert_close(x, problem.wanted, INVERSE_F64)
    assert solution.passes == passes
    assert solution.evaluations == 3 * evaluations
    assert solution.residual.isnan().all()


@pytest.mark.parametrize("passes", [1, 2])
def test_a_window_of_gs_jacobi_sees_the_last_iterate_of_those_before(passes: int) -> None:
    problem = problem_of()
    x, _, _ = solved(problem, functools.partial(gs_jacobi, segments=4, passes=passes, clamp=math.inf))
    assert (x - problem.wanted).abs().max() > 1e-3  # so few passes leave an error to be compared
    for start, stop in windows(16, 4):
        state = problem.engine.begin(problem.z, problem.condition)
        for _ in range(passes):
            state.x[:, :start] = x[:, :start]
            problem.engine.fixed_point(state, 1, stop)
        assert_close(x[:, start:stop], state.x[:, start:stop], SAME_F64)


def test_values_are_clamped_in_gs_jacobi_alone() -> None:
    problem = problem_of(scale=2.0)
    assert problem.wanted[:, 1:].abs().max() > 1.2 * CLAMP
    x, _, _ = solved(problem, functools.partial(gs_jacobi, segments=2, passes=8))
    assert x[:, 1:].abs().max() == CLAMP
    assert torch.equal(x[:, 0], problem.z[:, 0])
    for solver in (functools.partial(jacobi, threshold=1e-12), functools.partial(adaptive, tol=1e-12)):
        assert_close(solved(problem, solver)[0], problem.wanted, INVERSE_F64)


@pytest.mark.parametrize(
    ("changes", "threshold", "passes"),
    [
        ([9.0, 0.5, 0.499, 0.0], 0.5, 3),  # 0.5 is not below 0.5
        ([0.4], 0.5, 1),
        ([math.nan, math.inf, 0.1], 0.5, 3),
        ([1.0] * 9, 0.5, 7),  # T − 1
        ([0.0] * 9, 0.0, 7),
    ],
)
def test_jacobi_stops_after_the_first_pass_below_its_threshold(
    changes: list[float], threshold: float, passes: int
) -> None:
    seen = iter(changes)

    def fixed_point(state: BlockState, start: int, stop: int) -> Any:
        assert (start, stop) == (1, 8)
        change = torch.zeros(2, 7)
        change[1, 4] = next(seen)  # one token of one sample
        return SimpleNamespace(change=change)

    steps: list[int] = []
    state: Any = SimpleNamespace(x=torch.zeros(2, 8, 1))
    engine: Any = SimpleNamespace(fixed_point=fixed_point)
    solution = jacobi(engine, state, steps.append, threshold=threshold)
    assert solution.passes == len(steps) == passes
    assert solution.evaluations == 2 * 7 * passes
    assert sum(steps) == 7


@pytest.mark.parametrize(("tokens", "segments"), [(49, 7), (49, 5), (16, 16), (4, 9), (9, 1), (1, 3)])
def test_windows_are_the_tokens_in_equal_parts(tokens: int, segments: int) -> None:
    found = windows(tokens, segments)
    assert [i for start, stop in found for i in range(start, stop)] == list(range(1, tokens))
    lengths = [stop - start for start, stop in found]
    assert all(tokens // segments - 1 <= length <= -(-tokens // segments) for length in lengths)
    assert len(found) == min(segments, tokens) - (tokens <= segments)


# A cell


def test_every_block_begins_from_the_sequential_result_of_the_one_before() -> None:
    model = random_model(3, num_classes=2)
    suite = copy.copy(SUITE)
    suite.chosen = SimpleNamespace(backend="torch", batch=5, guidance=0.0, seed=7)
    suite.model = model
    found = list(suite.cases())
    assert [problem.block for problem in found] == [1, 0]
    labels = found[0].condition.labels
    assert labels is not None
    assert labels.tolist() == [0, 1, -1, 0, 1]
    images = tarflow_fast.Sampler(model, backend="torch").sample(5, [0, 1, -1], seed=7).images
    assert torch.equal(model.unpatchify(found[-1].wanted), images)


def test_a_run_says_what_each_pass_made_final() -> None:
    problem = problem_of()
    first = next(iter(candidates(4, 2).values()))
    run = examine(problem, first)
    assert run["final"] == list(range(1, 17))  # one token a step, and the latents are no solution
    assert (run["passes"], run["evaluations"]) == (15, 15)
    for solve in list(candidates(4, 2).values())[3:8]:
        run = examine(problem, solve)
        assert len(run["final"]) == run["passes"] + 1
    state = problem.begin()
    state.x.copy_(problem.wanted)
    state.x[2, 9:] += 2 * solver_cases.FINAL
    state.x[1, 11] = torch.nan
    assert problem.final(state.x) == 9


def test_jacobi_at_the_same_error() -> None:
    problem = problem_of()
    errors = jacobi_errors(problem)
    assert len(errors) == 15
    errors = errors[:6]
    assert 0 < errors[-1] < errors[0]
    x, _, _ = solved(problem, functools.partial(gs_jacobi, segments=1, passes=len(errors), clamp=math.inf))
    assert float((x - problem.wanted).abs().max()) == pytest.approx(errors[-1], rel=1e-6)
    entry = measure(problem, candidates(4, 2), Rounds(1, 1.0))
    for run in entry["runs"][1:4]:
        passes = run["jacobi_evaluations"] // 15
        errors = jacobi_errors(problem)
        assert errors[passes - 1] <= run["max_error"] < min(errors[: passes - 1])


@pytest.mark.parametrize(("by", "passed"), [(0.9, True), (1.1, False), (math.nan, False)])
def test_adaptive_is_held_to_its_tolerance_and_others_to_none(
    by: float, passed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off(engine: BlockEngine, state: BlockState, progress: Any = None, *, tol: float) -> Solution:
        found = adaptive(engine, state, progress, tol=1e-9)
        state.x[0, 3] += by * BOUND * tol
        return found

    monkeypatch.setattr(solver_cases, "adaptive", off)
    cell = measure(problem_of(), candidates(4, 2), Rounds(1, 1.0))
    names = [run["name"] for run in cell["runs"]]
    assert cell["check"]["passed"] is passed
    assert names == [name for name in NAMES if passed or not name.startswith("adaptive")]
    assert max(run["max_error"] for run in cell["runs"][-5:]) > 0.1  # SeJD's rule and GS-Jacobi


def test_more_passes_than_steps_is_a_failure() -> None:
    def made(adaptive_passes: int) -> dict[str, Any]:
        runs = [{"name": "sequential", "passes": 15}, {"name": "adaptive 0.001", "passes": adaptive_passes}]
        return {"cells": [{"runs": [*runs, {"name": "all-Jacobi 0.001", "passes": 99}]}] * 2}

    assert SUITE.verdicts(made(15)) == []
    assert SUITE.verdicts(made(16)) == ["adaptive 0.001 took 32 passes, the sequential solver 30 steps"]


# The suite


def solver(tmp_path: Path, *more: str, spoil: float = 1.0) -> tuple[Result, Path]:
    model, out = random_model(3, num_classes=2), tmp_path / "run.json"
    with torch.no_grad():
        model.blocks[1].proj_out.weight.mul_(spoil)
    tarflow_fast.save(model, tmp_path / "tiny.safetensors")
    arguments = ("--batch", "4", "--segments", "4", "--gs-passes", "2", "--repeat", "2", "--backend", "torch")
    result = bench("solver", "--model", tmp_path / "tiny.safetensors", *arguments, "--out", out, *more)
    return result, out


@pytest.mark.parametrize("guidance", [pytest.param(0.0, marks=pytest.mark.slow), 2.0])
def test_end_to_end(tmp_path: Path, guidance: float) -> None:
    result, out = solver(tmp_path, "--guidance", str(guidance))
    assert result.exit_code == 0, result.output
    made = record.read(out)
    assert (made["suite"], made["failures"], made["limits"]) == ("solver", [], {})
    settings = made["settings"]
    assert (settings["model"], settings["batch"], settings["guidance"]) == ("tiny.safetensors", 4, guidance)
    assert "baseline_sha256" not in settings
    assert [cell["label"] for cell in made["cells"]] == [{"block": 1}, {"block": 0}]
    for cell in made["cells"]:
        assert cell["check"]["passed"]
        assert [run["name"] for run in cell["runs"]] == NAMES
        assert all(len(run["seconds"]) == 2 and run["median"] > 0 for run in cell["runs"])
        assert all(run["ratio"]["median"] > 0 for run in cell["runs"][1:])
        assert all(run["final"] is not None for run in cell["runs"])
        assert all(run["jacobi_evaluations"] % 15 == 0 for run in cell["runs"][1:4])
    table = SUITE.table(made)
    assert table in result.output
    rows = [line.split() for line in table.splitlines() if "adaptive 0.001" in line]
    passes = [cell["runs"][2]["passes"] for cell in made["cells"]]
    assert [(row[0], row[3]) for row in rows] == [
        ("1", str(passes[0])),
        ("0", str(passes[1])),
        ("all", str(sum(passes))),
    ]
    with Image.open(out.with_suffix(".png")) as image:
        image.verify()
    assert str(tmp_path) not in out.read_text()
    assert str(machine.ROOT) not in out.read_text()
    shown = bench("show", out)
    assert shown.exit_code == 0, shown.output
    assert table in shown.output


def test_a_failed_check_is_in_the_record_and_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver_cases, "BOUND", 1e-9)
    result, out = solver(tmp_path)
    assert result.exit_code == 1
    assert "2 of 2 checks failed" in result.output
    made = record.read(out)
    for cell in made["cells"]:
        assert not cell["check"]["passed"]
        assert [left["name"] for left in cell["left_out"]] == NAMES[1:4]
        assert f"FAILED block {cell['label']['block']}: {cell['check']['reason']}" in result.output
    assert bench("show", out).exit_code == 0


@pytest.mark.slow
def test_too_many_passes_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(engine: BlockEngine, state: BlockState, progress: Any = None, *, tol: float) -> Solution:
        found = adaptive(engine, state, progress, tol=tol)
        return replace(found, passes=16)

    monkeypatch.setattr(solver_cases, "adaptive", slow)
    result, out = solver(tmp_path)
    assert result.exit_code == 1
    assert record.read(out)["failures"] == ["adaptive 0.001 took 32 passes, the sequential solver 30 steps"]
    assert "FAILED adaptive 0.001 took 32 passes" in result.output


def test_a_model_that_overflows_fails_with_a_record(tmp_path: Path) -> None:
    result, out = solver(tmp_path, spoil=1e4)
    assert result.exit_code == 1
    assert "sequential: not finite" in result.output
    assert not any(cell["runs"] for cell in record.read(out)["cells"])


def test_wrong_usage(tmp_path: Path) -> None:
    assert bench("solver", "--model", tmp_path / "missing.pth").exit_code == 2
    assert bench("solver", "--batch", "0").exit_code == 2
    assert solver(tmp_path, "--out", "run.txt")[0].exit_code == 2
    result, out = solver(tmp_path, "--backend", "none")
    assert result.exit_code == 1
    assert "backend: expected one of" in result.output
    assert not out.exists()
    assert "GS-Jacobi" in bench("solver", "--help").output


def test_a_sampler_with_other_solvers_shares_its_engines() -> None:
    model = random_model(3, num_classes=2)
    sampler = tarflow_fast.Sampler(model, backend="torch", solver="sequential")
    other = sampler.with_solvers([functools.partial(adaptive, tol=1e-6)] * 2)
    assert other.engines is sampler.engines
    a, b = (each.sample(4, seed=3) for each in (sampler, other))
    assert [block.window for block in a.report.blocks] == [1, 1]
    assert all(block.window > 1 for block in b.report.blocks)
    assert_close(a.images, b.images, 1e-4)
    with pytest.raises(tarflow_fast.ArgumentError, match="one for each of the 2 blocks"):
        sampler.with_solvers(sampler.solvers[:1])
