"""The adaptive solver: the sequential result in fewer passes, its stated residual, and guesses that overflow."""

from __future__ import annotations

import pytest
import torch
from cases import random_latents, random_model
from engines import GUIDED
from hypothesis import given, settings
from hypothesis import strategies as st
from solved import NATIVE, engine_of, louder, plan_of, solved
from tolerances import GOLDEN, INVERSE_F64, assert_close

from tarflow_fast import NonFiniteError, Sampler, load_pretrained, reference
from tarflow_fast.backend.cpu.engine import cpu_missing
from tarflow_fast.engine import BlockEngine, BlockState, Condition, Guidance
from tarflow_fast.errors import ArgumentError
from tarflow_fast.solvers import adaptive, make_solvers


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), [("torch", torch.float64, INVERSE_F64), NATIVE])
@settings(max_examples=25)
@given(data=st.data())
def test_equal_to_sequential_after_at_most_so_many_passes(
    backend: str, dtype: torch.dtype, tolerance: float, data: st.DataObject
) -> None:
    """For any weights, window, batch and guidance; T = 1, 4, 9, 16."""
    size, batch = data.draw(st.sampled_from([2, 4, 6, 8])), data.draw(st.integers(1, 4))
    model = random_model(data.draw(st.integers(0, 99)), dtype, num_classes=2, img_size=size)
    engine = engine_of(louder(model, data.draw(st.sampled_from([0.1, 0.5, 1.5]))), backend, dtype)
    labels = torch.tensor(data.draw(st.lists(st.integers(-1, 1), min_size=batch, max_size=batch)))
    condition = Condition(labels, data.draw(st.sampled_from([Guidance(), GUIDED, Guidance(0.5, "b")])))
    z = random_latents(model, batch, data.draw(st.integers(0, 99)))
    T = model.config.num_patches
    window = data.draw(st.none() | st.integers(1, T))
    wanted, state = solved(engine, z, condition), engine.begin(z, condition)
    steps: list[int] = []
    solution = adaptive(engine, state, steps.append, tol=0.0, window=window)
    assert solution.passes <= max(T - 1, 0)
    assert sum(steps) == T - 1
    assert len(steps) == solution.passes
    assert_close(state.x, wanted.x, tolerance)
    assert_close(state.token_log_det, wanted.token_log_det, tolerance)
    assert solution.residual.tolist() == [0.0] * batch


@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-4])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("nvp", [True, False])
def test_the_residual_is_what_the_density_pass_finds(tol: float, window: int | None, nvp: bool) -> None:
    model = random_model(4, torch.float64, img_size=10, nvp=nvp)
    engine, z = engine_of(model), random_latents(model, 3)
    state = engine.begin(z, Condition())
    solution = adaptive(engine, state, tol=tol, window=window)
    again, _ = reference.block_density(model.state_dict(), 0, state.x)
    assert_close(solution.residual, (again - z).abs().amax((1, 2)), INVERSE_F64)
    assert (solution.residual > 0).all()
    if not nvp:  # it is how far a token would move
        assert (solution.residual <= tol).all()
    assert_close(state.x, solved(engine, z).x, 5 * tol)
    assert_close(state.token_log_det, reference.block_density(model.state_dict(), 0, state.x)[1].neg(), INVERSE_F64)


def test_a_larger_tolerance_takes_fewer_passes_and_all_fewer_evaluations_than_jacobi() -> None:
    model = random_model(4, torch.float64, img_size=14)
    engine, z, T = engine_of(model), random_latents(model, 3), model.config.num_patches
    found = [adaptive(engine, engine.begin(z, Condition()), tol=tol) for tol in (1e-1, 1e-3, 1e-6, 0.0)]
    passes = [solution.passes for solution in found]
    assert passes == sorted(passes)
    assert passes[0] < passes[2] < T // 2
    for solution in found:
        assert solution.evaluations < 3 * (T - 1) * solution.passes


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), [("torch", torch.float32, GOLDEN), NATIVE])
@pytest.mark.parametrize("start", ["z", "zeros"])
def test_guesses_that_overflow_neither_reach_final_tokens_nor_stop_convergence(
    backend: str, dtype: torch.dtype, tolerance: float, start: str
) -> None:
    """The log-scale is 120 · (first value of the token before − what it is in the solution), so that only the right
    tokens have finite ones after them."""
    model = random_model(7, dtype, img_size=8)
    T = model.config.num_patches
    engine = Overflowing(engine_of(model, backend, dtype))
    z = random_latents(model, 2)
    wanted = solved(engine.inner, z)
    engine.solution = wanted.x.clone()
    state = engine.begin(z, Condition())
    if start == "zeros":
        state.x[:, 1:] = 0
    solution = adaptive(engine, state, tol=0.0)
    assert engine.overflows > 0
    assert solution.passes < T
    assert_close(state.x, wanted.x, tolerance)


class Overflowing:
    """An engine whose tokens overflow wherever the token before is off by more than 0.1."""

    ragged = False

    def __init__(self, inner: BlockEngine):
        self.inner, self.overflows = inner, 0
        self.solution = torch.empty(0)
        self.begin = inner.begin

    def fixed_point(self, state: BlockState, start: int, stop: int) -> object:
        off = (state.x - self.solution).abs().amax(-1)[:, start - 1 : stop - 1] > 0.1
        moved = self.inner.fixed_point(state, start, stop)
        state.x[:, start:stop][off] = torch.inf
        self.overflows += int(off.sum())
        return moved._replace(change=moved.change.masked_fill(off, torch.inf))


# In the sampler


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_images_of_the_shipped_model_are_within_a_thousandth(backend: str, guidance: float) -> None:
    if backend == "cpu" and cpu_missing() is not None:
        pytest.skip(str(cpu_missing()))
    model = load_pretrained()
    exact, fast = (
        Sampler(model, backend=backend, solver=solver).sample(4, [0, 3, 8, -1], guidance=guidance)
        for solver in ("sequential", "adaptive")
    )
    assert_close(fast.images, exact.images, 1e-3)
    if not guidance:
        assert fast.log_prob is not None
        assert exact.log_prob is not None
        assert_close(fast.log_prob / exact.log_prob, torch.ones(4), 1e-4)
    T = model.config.num_patches
    assert [block.passes for block in exact.report.blocks] == [T - 1] * 4
    passes = [block.passes for block in fast.report.blocks]
    # torch's own rounding makes one block go on, by passes that gain a token or two each
    assert sum(passes) <= (0.45 if backend == "cpu" else 0.6) * 4 * (T - 1)
    assert 0 < max(block.residual for block in fast.report.blocks) < 1e-2
    for block in fast.report.blocks:
        assert 4 * block.passes <= block.evaluations < 4 * block.passes * (T - 1)


def test_a_block_that_overflows_is_named_as_by_the_sequential_solver() -> None:
    model = random_model(img_size=6)
    with torch.no_grad():
        model.blocks[0].proj_out.weight[0].fill_(50.0)
    found = []
    for solver in ("sequential", "adaptive"):
        with pytest.raises(NonFiniteError) as raised:
            Sampler(model, backend="torch", solver=solver).reverse(random_latents(model, 3))
        found.append((raised.value.block, raised.value.token, raised.value.sample))
    assert found[0] == found[1]


def test_tolerance_and_plan_are_for_parallel_passes() -> None:
    with pytest.raises(ArgumentError, match=r"^plan: expected None with solver='sequential'"):
        Sampler(random_model(), solver="sequential", plan=plan_of())
    with pytest.raises(ArgumentError, match=r"^tol: expected None with solver='sequential', which is exact"):
        Sampler(random_model(), solver="sequential", tol=1e-3)
    with pytest.raises(ArgumentError, match=r"^tol: expected a finite number >= 0, got -1"):
        make_solvers("adaptive", -1, None, dtype=torch.float32, shapes=[random_model().config.block_shape] * 2)
    with pytest.raises(ArgumentError, match=r"^tol: expected a finite number >= 0, got '1'"):
        Sampler(random_model(), tol="1")  # type: ignore[arg-type]
