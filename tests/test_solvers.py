"""The adaptive solver: the sequential result in fewer passes, its stated residual, and guesses that overflow."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import random_latents, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tolerances import GOLDEN, INVERSE_F64, assert_close
from torch import Tensor

from tarflow_fast import CheckpointError, NonFiniteError, Sampler, SolverPlan, load_pretrained, reference
from tarflow_fast.backend import make_engines
from tarflow_fast.backend.cpu.engine import cpu_missing
from tarflow_fast.engine import BlockEngine, BlockState, Condition, Guidance
from tarflow_fast.engine.backend import Request
from tarflow_fast.engine.contract import Moved
from tarflow_fast.errors import ArgumentError
from tarflow_fast.models.tarflow import TarFlow
from tarflow_fast.solvers import adaptive, make_solvers, sequential
from tarflow_fast.solvers.frontier import Frontier

GUIDED = Guidance(1.5, "ab", 0.7, True)
NATIVE = pytest.param(
    "cpu", torch.float32, 0.0, marks=pytest.mark.skipif(cpu_missing() is not None, reason=str(cpu_missing()))
)


def engine_of(model: TarFlow, backend: str = "torch", dtype: torch.dtype = torch.float64) -> BlockEngine:
    weights = model.block_weights(0)
    return make_engines(backend, [weights], Request(torch.device("cpu"), dtype, False))[0]


def solved(engine: BlockEngine, z: Tensor, condition: Condition = Condition()) -> BlockState:  # noqa: B008
    state = engine.begin(z, condition)
    sequential(engine, state)
    return state


def louder(model: TarFlow, factor: float) -> TarFlow:
    """The same with log-scales and shifts so many times as large: a block that is harder to guess."""
    with torch.no_grad():
        for block in model.blocks:
            block.proj_out.weight.mul_(factor)
    return model


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


# What is learnt


def plan_of(**changes: Tensor) -> SolverPlan:
    """A plan that fits `random_model()`: 2 blocks, 16 tokens of 4 values, windows 2, 4, 8 and 15."""
    tensors = {"slope": torch.zeros(2, 16, 4), "shift": torch.zeros(2, 16, 4)}
    tensors |= {"passes": torch.ones(2, 4), "evaluations": torch.full((2, 4), torch.nan)}
    return SolverPlan(**{**tensors, **changes})


def test_a_plan_is_the_affine_map_that_fits_best() -> None:
    z = torch.randn(500, 3, 2, dtype=torch.float64)
    slope, shift = torch.tensor([0.5, 2.0]), torch.tensor([-1.0, 3.0])
    plan = SolverPlan.fit([(z, slope * z + shift), (z, z)])
    assert_close(plan.slope[0], slope.expand(3, 2), GOLDEN)
    assert_close(plan.shift[0], shift.expand(3, 2), GOLDEN)
    assert_close(plan.guess(1, z), z, GOLDEN)


def test_a_learnt_plan_saves_passes_and_changes_nothing_else(tmp_path: Path) -> None:
    model = load_pretrained()
    labels = [*range(10), -1]
    plan = Sampler(model).learn_plan(200, labels, seed=1)
    plan.save(tmp_path / "plan.safetensors")
    again = SolverPlan.load(tmp_path / "plan.safetensors")
    for name, tensor in vars(plan).items():
        assert torch.equal(getattr(again, name), tensor), name
    without, with_plan = (Sampler(model, solver="adaptive", tol=1e-3, plan=p).sample(16, labels) for p in (None, again))
    exact = Sampler(model, solver="sequential").sample(16, labels)
    assert_close(with_plan.images, exact.images, 2e-2)
    before, after = ([block.passes for block in out.report.blocks] for out in (without, with_plan))
    assert sum(after) < sum(before)
    assert sum(block.evaluations for block in with_plan.report.blocks) < sum(
        block.evaluations for block in without.report.blocks
    )
    assert sorted(after)[2] <= 10  # of the three easy blocks


@pytest.mark.parametrize("k", [0, 1])
def test_a_guess_is_in_the_order_of_its_block(k: int) -> None:
    """A plan learnt on a model whose blocks are nearly affine guesses them nearly right, flipped ones too."""
    model = louder(random_model(3, num_blocks=2, img_size=6), 0.05)
    sampler = Sampler(model, backend="torch")
    plan = sampler.learn_plan(64)
    engine = make_engines("torch", [model.block_weights(k)], Request(torch.device("cpu")))[0]
    z = random_latents(model, 4)
    wanted = solved(engine, z)
    off = (plan.guess(k, z) - wanted.x).abs().mean()
    assert off < 0.3 * (z - wanted.x).abs().mean()
    assert off < 0.5 * (plan.guess(k, z.flip(1)).flip(1) - wanted.x).abs().mean()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("fast", "plan: expected a SolverPlan, got str"),
        (plan_of(slope=torch.zeros(2, 16, 3)), r"\(blocks, tokens, values\) = \(2, 16, 4\), got"),
        (plan_of(shift=torch.full((2, 16, 4), torch.nan)), "finite guesses, got infinities or NaNs"),
        (plan_of(passes=torch.ones(2, 5)), r"passes and evaluations of \(blocks, windows\) = \(2, 4\), got \(2, 5\)"),
        (plan_of(evaluations=torch.zeros(2, 4)), "positive numbers of passes and evaluations, got 0"),
    ],
    ids=["type", "shape", "finite", "windows", "positive"],
)
def test_a_plan_that_does_not_fit_is_refused(plan: SolverPlan, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Sampler(random_model(), solver="adaptive", plan=plan)


def test_files_that_are_no_plans(tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    with pytest.raises(CheckpointError, match="not a solver plan"):
        SolverPlan.load(path)
    path.write_bytes(b"no")
    with pytest.raises(CheckpointError, match="not a solver plan"):
        SolverPlan.load(path)
    names = ("slope", "shift", "passes", "evaluations")
    for tensors in (
        {},
        {"slope": torch.zeros(1), "shift": torch.zeros(1)},
        {name: torch.zeros(1) for name in names},
        {name: torch.zeros(1, 4, 2).double() for name in names},
        {"x": torch.zeros(1), **{name: torch.zeros(1) for name in names}},
    ):
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match="not a solver plan") as caught:
            SolverPlan.load(path)
        assert str(caught.value).isprintable()
    for other in (None, 3, b"x"):
        with pytest.raises(ArgumentError, match="path: expected a path"):
            SolverPlan.load(other)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="no such file"):
        SolverPlan.load(tmp_path)
    save_file({"slope": torch.zeros(1), "shift": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="not a solver plan"):
        SolverPlan.load(path)
    with pytest.raises(ArgumentError, match=r"path: expected a file name ending in \.safetensors"):
        plan_of().save(tmp_path / "plan.pt")


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
    assert sum(passes) <= 0.45 * 4 * (T - 1)
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
