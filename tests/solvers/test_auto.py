"""The auto solver: what passes cost, how many a block takes, and that the quickest way is found."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import random_latents, random_model
from engines import GUIDED
from hypothesis import given, settings
from hypothesis import strategies as st
from solved import NATIVE, engine_of, louder, solved
from tolerances import INVERSE_F64, assert_close

from tarflow_fast import Sampler, load_pretrained
from tarflow_fast.engine import Condition, timing
from tarflow_fast.engine.contract import Moved
from tarflow_fast.solvers import Auto, Costs, CostTable, PassEstimate, auto, costs, widths
from tarflow_fast.solvers.pass_estimate import WORTH
from tarflow_fast.solvers.windows import hoped_advance

measure = costs.measure  # before the fixture that sets fixed costs


@pytest.mark.parametrize("tokens", range(1, 70))
def test_windows_are_powers_of_two_and_all_tokens_but_the_first(tokens: int) -> None:
    found = widths(tokens)
    assert found == sorted(set(found))
    assert found[-1] == max(tokens - 1, 1)
    assert found[:-1] == [w for w in (2, 4, 8, 16, 32, 64) if w < tokens - 1]


# What passes cost


def test_costs_between_and_beyond_the_widths_that_were_measured() -> None:
    found = Costs(1.0, {2: 3.0, 4: 5.0, 8: 7.0})
    assert [found.of_pass(w) for w in (1, 2, 3, 4, 6, 8, 16)] == [3.0, 3.0, 4.0, 5.0, 6.0, 7.0, 14.0]


class Timed:
    """An engine that takes so many seconds by its own clock, and sets itself up in the first two runs of a size."""

    def __init__(self, token: float, of_pass: dict[int, float], tokens: int, ragged: bool = True):
        self.token, self.of_pass, self.ragged = token, of_pass, ragged
        self.now = self.setup_seconds = 0.0
        self.runs: dict[int, int] = {}
        z = torch.randn(3, tokens, 2)
        self.state: Any = SimpleNamespace(
            z=z, x=z.clone(), token_log_det=torch.ones(3, tokens), nonfinite=None, condition=Condition()
        )

    def _take(self, width: int, seconds: float) -> None:
        self.runs[width] = self.runs.get(width, 0) + 1
        if self.runs[width] <= 2:
            self.setup_seconds += 100
            self.now += 100
        self.now += seconds

    def reverse(self, state: Any, progress: None, start: int, stop: int) -> None:
        assert 1 <= start < stop <= state.x.shape[1]
        state.x[:, start:stop] = state.token_log_det[:, start:stop] = torch.nan
        self._take(1, self.token * (stop - start))

    def fixed_point(self, state: Any, start: Any, stop: Any) -> Any:
        (start,), (stop,) = (set(s if self.ragged else [s]) for s in (start, stop))
        assert 1 <= start < stop <= state.x.shape[1]
        state.x[:, start:stop] += 1
        state.token_log_det[:, start:stop] = torch.nan
        self._take(stop - start, self.of_pass[stop - start])
        return Moved(torch.ones(3, stop - start), torch.ones(3, stop - start))


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize(
    ("of_pass", "measured"),
    [
        ({2: 1.0, 4: 1.1, 8: 1.5, 16: 2.8, 30: 5.0}, [2, 4, 8, 16, 30]),
        ({2: 1.0, 4: 1.4, 8: 2.2, 16: 3.0, 30: 5.0}, [2, 4, 8]),  # 1 token in 0.8 s more, at best
    ],
)
def test_measured_costs_leave_the_state_alone_and_setting_up_out(
    monkeypatch: pytest.MonkeyPatch, of_pass: dict[int, float], measured: list[int], ragged: bool
) -> None:
    engine = Timed(0.6, of_pass, 31, ragged)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: engine.now))
    found = measure(engine, engine.state, widths(31))  # type: ignore[arg-type]
    assert found.token == pytest.approx(0.6)
    assert found.passes == pytest.approx({w: of_pass[w] for w in measured})
    assert torch.equal(engine.state.x, engine.state.z)
    assert torch.equal(engine.state.token_log_det, torch.ones(3, 31))


@pytest.mark.parametrize("size", [4, 6, 10])
def test_costs_of_engines(size: int) -> None:
    model = random_model(1, img_size=size)
    engine, z = engine_of(model), random_latents(model, 3)
    state = engine.begin(z, Condition(guidance=GUIDED))
    found = measure(engine, state, widths(z.shape[1]))
    assert found.token > 0
    assert all(value > 0 for value in found.passes.values())
    assert_close(state.x, z.double(), 0.0)
    assert (state.token_log_det == 0).all()
    wanted = solved(engine, z, Condition(guidance=GUIDED))
    engine.reverse(state)
    assert_close(state.x, wanted.x, INVERSE_F64)


def test_costs_are_measured_once_for_a_size_of_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(1)
    engine, table = engine_of(model), CostTable()
    sizes: list[int] = []

    def counted(engine: object, state: Any, widths: list[int]) -> Costs:
        sizes.append(state.x.shape[0])
        return Costs(float(len(sizes)))

    monkeypatch.setattr(auto, "measure", counted)
    states = [engine.begin(random_latents(model, n), Condition(guidance=GUIDED)) for n in (2, 3)]
    states += [engine.begin(random_latents(model, 2), Condition())]
    assert [table.of(engine, state).token for state in states * 2] == [1.0, 2.0, 3.0] * 2
    assert sizes == [2, 3, 2]


# Which window


TOKENS = 33
seconds = st.floats(0.1, 20)


@st.composite
def machines(draw: st.DrawFn) -> tuple[Costs, dict[int, float]]:
    """Costs that grow with the width, and passes that a block takes, which wider windows do not make more."""
    grow = list(itertools.accumulate(draw(st.floats(0, 5)) for _ in widths(TOKENS)))
    base = draw(seconds)
    found = Costs(draw(seconds), {w: base + more for w, more in zip(widths(TOKENS), grow, strict=True)})
    passes, least = {}, float(TOKENS - 1)
    for window in widths(TOKENS):
        hoped = (TOKENS - 1) / hoped_advance(window)
        least = passes[window] = draw(st.floats(min(hoped, least), least))
    return found, passes


def evaluated(window: int, passes: float) -> float:
    """Tokens, if the frontier moves at one speed."""
    return passes * window * (1 - window / (2 * (TOKENS - 1)))


def real_seconds(found: Costs, passes: dict[int, float], window: int | None) -> float:
    if window is None:
        return found.token * (TOKENS - 1)
    return passes[window] * found.of_pass(evaluated(window, passes[window]) / passes[window])


@settings(max_examples=300)
@given(machines())
def test_the_quickest_way_is_found_and_kept(machine: tuple[Costs, dict[int, float]]) -> None:
    """Whatever passes cost and a block takes, within what is hoped for: after some batches the choice stays, and it is
    the quickest, or the sequential pass if that takes at most 1/WORTH of its time."""
    found, passes = machine
    pace = PassEstimate(TOKENS, {}, {})
    for _ in range(len(passes) + 1):
        window = pace.choose(found)
        if window is not None:
            pace.learn(window, passes[window], evaluated(window, passes[window]))
    for _ in range(3):
        assert pace.choose(found) == window
    best = min(real_seconds(found, passes, each) for each in (None, *passes))
    assert real_seconds(found, passes, window) <= best / (WORTH if window is None else 1) * (1 + 1e-9)


@settings(max_examples=100)
@given(machines())
def test_a_window_has_as_many_passes_as_the_sequential_pass_has_time(machine: tuple[Costs, dict[int, float]]) -> None:
    found, passes = machine
    pace = PassEstimate(TOKENS, {}, {})
    for window in passes:
        most = pace.most(window, found)
        assert most * found.of_pass(window) < found.token * (TOKENS - 1) + found.of_pass(window) * (1 + 1e-9)
        assert most == 1 or most * found.of_pass(window) >= found.token * (TOKENS - 1) * (1 - 1e-9)


def test_what_was_learnt_follows_the_batches() -> None:
    pace = PassEstimate(TOKENS, {}, {})
    for passes in (10.0, 20.0, 20.0):
        pace.learn(8, passes, 8 * passes)
    assert pace.passes == {8: 17.5}
    assert pace.evaluations == {8: 140.0}


# The solver


def table(token: float, of_pass: float, tokens: int) -> CostTable:
    """Where a pass costs the same whatever its width."""
    fixed: Any = SimpleNamespace(of=lambda engine, state: Costs(token, dict.fromkeys(widths(tokens), of_pass)))
    return fixed


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), [("torch", torch.float64, INVERSE_F64), NATIVE])
@settings(max_examples=20)
@given(data=st.data())
def test_whatever_it_chooses_the_result_is_the_sequential_one(
    backend: str, dtype: torch.dtype, tolerance: float, data: st.DataObject
) -> None:
    """With tol = 0; windows that are given up half way too."""
    size, batch = data.draw(st.sampled_from([2, 4, 6, 8])), data.draw(st.integers(1, 4))
    model = louder(
        random_model(data.draw(st.integers(0, 99)), dtype, img_size=size), data.draw(st.sampled_from([0.5, 1.5]))
    )
    engine, T = engine_of(model, backend, dtype), model.config.num_patches
    condition = Condition(None, GUIDED) if data.draw(st.booleans()) else Condition()
    solver = Auto(0.0, PassEstimate(T, {}, {}), table(1.0, data.draw(st.floats(0.2, 4)), T))
    for number in range(4):
        z = random_latents(model, batch, number)
        wanted, state = solved(engine, z, condition), engine.begin(z, condition)
        steps: list[int] = []
        solution = solver(engine, state, steps.append)
        assert sum(steps) == T - 1
        assert solution.passes <= T - 1
        assert solution.steps <= solution.passes
        assert (solution.window == 1) == (solution.steps == T - 1)
        assert_close(state.x, wanted.x, tolerance)
        assert_close(state.token_log_det, wanted.token_log_det, tolerance)


def test_a_window_that_is_too_slow_is_given_up_and_not_tried_again() -> None:
    model = louder(random_model(3, torch.float64, img_size=16), 3.0)
    engine, T = engine_of(model), model.config.num_patches
    # Narrower windows cost less, but at the rate that was seen they would take longer still.
    costs: Any = SimpleNamespace(
        of=lambda engine, state: Costs(1.0, {w: 10.0 if w == T - 1 else 7.0 for w in widths(T)})
    )
    solver = Auto(1e-9, PassEstimate(T, {}, {}), costs)
    limit = -(-(T - 1) // 10)
    found = [solver(engine, engine.begin(random_latents(model, 2, i), Condition())) for i in range(4)]
    assert found[0].window == T - 1
    assert found[0].passes - found[0].steps == limit
    assert found[0].steps > 0
    assert [solution.window for solution in found[1:]] == [1, 1, 1]


def test_one_that_is_quicker_is_kept() -> None:
    model = louder(random_model(4, torch.float64, img_size=16), 0.2)
    engine, T = engine_of(model), model.config.num_patches
    solver = Auto(1e-6, PassEstimate(T, {}, {}), table(1.0, 1.5, T))
    found = [solver(engine, engine.begin(random_latents(model, 2, i), Condition())) for i in range(4)]
    assert {solution.window for solution in found} == {T - 1}
    assert max(solution.passes for solution in found) < (T - 1) / 3
    assert {solution.steps for solution in found} == {0}


def test_in_the_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real costs; whatever is chosen, images of the shipped model are within a thousandth."""
    monkeypatch.setattr(auto, "measure", measure)
    model = load_pretrained()
    labels = [0, 3, 8, -1]
    exact = Sampler(model, backend="torch", solver="sequential").sample(2, labels)
    sampler = Sampler(model, backend="torch")
    for _ in range(3):
        out = sampler.sample(2, labels)
        assert_close(out.images, exact.images, 1e-3)
        assert out.report.solver == "auto"
        assert out.report.setup_seconds < out.report.seconds
    assert out.report.setup_seconds == 0


@pytest.mark.slow
def test_a_plan_spares_the_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what a plan has learnt the first batch is solved like the later ones."""
    monkeypatch.setattr(auto, "measure", lambda engine, state, widths: Costs(1.0, dict.fromkeys(widths, 2.0)))
    model, labels = load_pretrained(), [0, 3, 8, -1]
    plan = Sampler(model).learn_plan(32, labels)
    assert plan.passes[:, -1].tolist() == plan.passes.amin(1).tolist()
    assert (plan.evaluations[:, :-1] < plan.evaluations[:, 1:]).all()
    sampler = Sampler(model, plan=plan)
    first, second = (sampler.sample(4, labels).report.blocks for _ in range(2))
    assert [block.window for block in first] == [block.window for block in second]
    assert [block.window > 1 for block in first] == [True, True, True, False]  # 31 passes of 2 for 48 tokens
