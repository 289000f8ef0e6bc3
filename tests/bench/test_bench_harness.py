"""The one timing harness: candidates take turns, and are checked before they are timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.common import harness
from bench.common.harness import TOLERANCE, Rounds, admit, admit_all, measure_cell
from bench.suites.gpu.cells import case_of
from tarflow_fast import NonFiniteError


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


def fails() -> Tensor:
    raise RuntimeError("no such kernel\nand more")


EXACT = torch.zeros(2, 3)
WRONG: dict[str, tuple[Callable[[], Tensor], str]] = {
    "nan": (lambda: EXACT / 0, "not finite"),
    "shape": (lambda: EXACT[:1], r"shape (1, 3), not (2, 3)"),
    "far": (lambda: EXACT + 0.2, "differs by 2.0e-01, more than 1.0e-01"),
    "raises": (fails, "RuntimeError: no such kernel"),
}


def steady(seconds: float = 1.0) -> Callable[[Callable[[], object]], float]:
    def timer(run: Callable[[], object]) -> float:
        run()
        return seconds

    return timer


def constant(value: Callable[[], Tensor]) -> harness.Candidate:
    return lambda: value


@pytest.mark.parametrize("wrong", list(WRONG))
def test_only_what_is_right_is_admitted(wrong: str) -> None:
    run, reason = WRONG[wrong]
    trial = admit(constant(run), EXACT, 0.1, steady())
    assert (trial.run, trial.reason) == (None, reason)
    right = admit(constant(lambda: EXACT + 0.09), EXACT, 0.1, steady())
    assert right.run is not None
    assert right.reason is None
    assert right.error == pytest.approx(0.09)


def entry_of(candidates: dict[str, Callable[[], Tensor]], **more: Any) -> dict[str, Any]:
    rounds = Rounds(3, more.pop("seconds", 100.0), timer=steady())
    options: dict[str, Any] = {"exact": EXACT, "tolerance": 0.1, "once": {"base": 0.25}, **more}
    made = {name: constant(run) for name, run in candidates.items()}
    found: Any = measure_cell(case_of("afhq:2:guided", dry=True), made, rounds, **options)
    return found


def names(entry: dict[str, Any]) -> list[str]:
    return [run["name"] for run in entry["runs"]]


@pytest.mark.parametrize("wrong", list(WRONG))
def test_a_failed_candidate_has_no_time_and_the_others_have(wrong: str) -> None:
    run, reason = WRONG[wrong]
    entry = entry_of({"base": lambda: EXACT, "bad": run, "good": lambda: EXACT + 0.05})
    assert names(entry) == ["base", "good"]
    assert not entry["check"]["passed"]
    assert entry["check"]["reason"] == f"bad: {reason}"
    assert entry["left_out"] == [{"name": "bad", "reason": reason}]
    assert entry["runs"][1]["max_error"] == pytest.approx(0.05)
    assert entry_of({"base": run, "good": lambda: EXACT})["runs"] == []


def test_a_tolerance_is_twice_the_yardsticks_error_and_the_baseline_has_its_slack() -> None:
    runs = {"base": 0.5, "yardstick": 0.1, "good": 0.24, "bad": 0.26}
    exact = EXACT.double() + 12.8  # half a unit of bf16 of that is 0.05
    candidates = {name: lambda error=error: exact + error for name, error in runs.items()}
    options = {"exact": exact, "yardstick": ("yardstick", torch.bfloat16)}
    entry = entry_of(candidates, **options, slack={"base": 2.1})
    assert entry["check"]["tolerance"] == pytest.approx(0.25)
    assert names(entry) == ["base", "yardstick", "good"]
    assert entry_of(candidates, **options)["runs"] == []


def test_a_baseline_that_is_too_slow_is_run_once() -> None:
    candidates = {"base": lambda: EXACT, "ours": lambda: EXACT}
    quick = entry_of(candidates, seconds=5.0)
    assert [len(run["seconds"]) for run in quick["runs"]] == [3, 3]
    slow = entry_of(candidates, seconds=3.0)
    assert [len(run["seconds"]) for run in slow["runs"]] == [1, 3]
    assert slow["runs"][1]["ratio"]["samples"] == [1.0, 1.0, 1.0]
