"""A batch's frontier: which windows a pass takes, and that samples are solved as they are alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import random_latents, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from solved import engine_of, louder, solved
from tolerances import INVERSE_F64, assert_close

from tarflow_fast.engine import BlockEngine, BlockState, Condition
from tarflow_fast.engine.contract import Moved
from tarflow_fast.solvers import adaptive
from tarflow_fast.solvers.frontier import Frontier


class Rectangular:
    """An engine that takes one window for all samples."""

    ragged = False

    def __init__(self, inner: BlockEngine):
        self.inner = inner
        self.begin, self.reverse = inner.begin, inner.reverse
        self.evaluated = 0

    def fixed_point(self, state: BlockState, start: int, stop: int) -> object:
        assert 1 <= start < stop <= state.x.shape[1]
        self.evaluated += state.x.shape[0] * (stop - start)
        return self.inner.fixed_point(state, start, stop)


@pytest.mark.parametrize("ragged", [True, False])
@settings(max_examples=20)
@given(data=st.data())
def test_a_batch_is_solved_as_its_samples_are_alone(ragged: bool, data: st.DataObject) -> None:
    """The same tokens at the same tolerance, in as many passes as the slowest takes; a ragged engine evaluates no more
    than for the samples one by one, another one no more than a window from the slowest to the foremost."""
    batch = data.draw(st.integers(1, 5))
    model = louder(
        random_model(data.draw(st.integers(0, 99)), torch.float64, img_size=10), data.draw(st.floats(0.2, 2))
    )
    inner, z, T = engine_of(model), random_latents(model, batch), model.config.num_patches
    z *= torch.rand(batch, 1, 1)  # samples that are easier than others
    window, tol = data.draw(st.integers(1, T)), data.draw(st.sampled_from([1e-2, 1e-4]))
    engine = inner if ragged else Rectangular(inner)
    state = engine.begin(z, Condition())
    solution = adaptive(engine, state, tol=tol, window=window)
    singles = [inner.begin(row[None], Condition()) for row in z]
    alone = [adaptive(inner, single, tol=tol, window=window) for single in singles]
    for got, wanted in (
        (state.x, torch.cat([single.x for single in singles])),
        (state.token_log_det, torch.cat([single.token_log_det for single in singles])),
        (solution.residual, torch.cat([each.residual for each in alone])),
    ):
        assert torch.equal(got.isnan(), wanted.isnan())  # of a sample whose inverse overflows
        assert_close(got.nan_to_num(), wanted.nan_to_num(), INVERSE_F64)
    assert solution.passes == max(each.passes for each in alone)
    least = sum(each.evaluations for each in alone)
    if ragged:
        assert solution.evaluations == least
    else:
        assert solution.evaluations == engine.evaluated >= least
        assert solution.evaluations <= batch * solution.passes * (T - 1)


class Scripted:
    """An engine in whose passes the first sample's tokens move, and of the others those outside of their windows alone.

    residual: 1 inside of a sample's own window, 100 elsewhere.
    """

    ragged = False

    def __init__(self, window: int):
        self.window = window
        self.windows: list[tuple[int, int]] = []

    def fixed_point(self, state: BlockState, start: int, stop: int) -> Moved:
        self.windows.append((start, stop))
        state.x[:, start:stop] += 1
        front = torch.tensor(self.frontier.reached).unsqueeze(1)
        token = torch.arange(start, stop)
        outside = (token < front) | (token >= front + self.window)
        moved = outside.float()
        moved[0] = 1
        moved[:, token >= 2 * self.window + 2] = 0
        return Moved(moved, torch.where(outside, 100.0, 1.0))

    frontier: Frontier


def test_windows_of_a_batch_that_an_engine_takes_as_one() -> None:
    """Three samples, T = 12, windows of 2: what each pass evaluates, what it makes final, and what it leaves alone."""
    engine = Scripted(2)
    state: Any = SimpleNamespace(x=torch.zeros(3, 12, 1), condition=Condition())
    engine.frontier = frontier = Frontier(engine, state, 0.5)  # type: ignore[arg-type]
    fronts, values = [], []
    while frontier.slowest < 12:
        frontier.advance(2)
        fronts.append(frontier.reached)
        values.append(state.x[..., 0].tolist())
    # The first gains a token a pass until it comes to token 6, where nothing moves; the others two.
    assert [row[0] for row in fronts] == [2, 3, 4, 5, 6, 8, 10, 12]
    assert [row[1] for row in fronts] == [row[2] for row in fronts] == [3, 5, 7, 9, 11, 12, 12, 12]
    # From the slowest frontier to the foremost end of those that are not done.
    assert engine.windows == [(1, 3), (2, 5), (3, 7), (4, 9), (5, 11), (6, 12), (8, 10), (10, 12)]
    assert frontier.evaluations == 3 * sum(stop - start for start, stop in engine.windows)
    # What is kept stays as it was; of the first sample's tokens each was given its new value when it was the front.
    assert values[0] == [[0, 1, 1, *[0] * 9], [0] * 12, [0] * 12]
    assert values[-1] == [[0, 1, 2, 2, 2, 2, 1, *[0] * 5], [0] * 12, [0] * 12]
    # Of the tokens that a pass kept: neither of those final before, nor of those beyond a sample's own window.
    assert frontier.residual.tolist() == [1.0, 1.0, 1.0]


class OverflowingOnce(Rectangular):
    """One whose token 7 overflows in the first pass."""

    def fixed_point(self, state: BlockState, start: int, stop: int) -> object:
        first = self.evaluated == 0
        moved: Any = super().fixed_point(state, start, stop)
        if first:
            state.x[:, 7], moved.change[:, 7 - start] = torch.inf, torch.inf
        return moved


@pytest.mark.parametrize("where", ["first guess", "first pass"])
def test_a_guess_that_overflows_delays_the_tokens_after_it_by_a_pass(where: str) -> None:
    """It is replaced; else the NaN that it makes of the next token would go on from token to token, pass by pass."""
    model = random_model(4, torch.float64, img_size=16)
    inner, z = engine_of(model), random_latents(model, 2)
    usual = adaptive(inner, inner.begin(z, Condition()), tol=1e-6)
    engine = OverflowingOnce(inner) if where == "first pass" else Rectangular(inner)
    later = torch.arange(7, z.shape[1])
    guess = (lambda z: z.index_fill(1, later, torch.inf)) if where == "first guess" else None
    state = engine.begin(z, Condition())
    solution = adaptive(engine, state, tol=1e-6, guess=guess)  # type: ignore[arg-type]
    assert usual.passes <= solution.passes <= usual.passes + 4 < z.shape[1] // 2
    assert_close(state.x, solved(inner, z).x, 1e-4)


def test_a_diverging_sample_neither_delays_nor_alters_another() -> None:
    model = random_model(5, torch.float64, img_size=12)
    engine, z = engine_of(model), random_latents(model, 3)
    alone = engine.begin(z[:2], Condition())
    few = adaptive(engine, alone, tol=1e-6, window=8)
    z[2, 7] = torch.inf
    state = engine.begin(z, Condition())
    solution = adaptive(engine, state, tol=1e-6, window=8)
    assert solution.passes <= few.passes + 7  # until its token 7 is final it takes part
    assert_close(state.x[:2], alone.x, INVERSE_F64)
    assert state.first_nonfinite().tolist() == [36, 36, 7]
    assert state.x[2, 8:].isnan().all()
    assert torch.isfinite(solution.residual).all()
