"""How far parallel passes may leave tokens from the sequential result: what is stated is never less."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import random_model
from torch import Tensor

from tarflow_fast import Sampler, TarFlow, TarFlowConfig, load_pretrained
from tarflow_fast.backend.cpu.engine import cpu_missing
from tarflow_fast.engine import Condition, Guidance
from tarflow_fast.engine.contract import Moved
from tarflow_fast.sampling.report import BlockReport
from tarflow_fast.solvers import Solution, adaptive, errors
from tarflow_fast.solvers.trail import MOVED, SAFETY, Trail, probe

ROUNDING = 3e-6  # of the shipped model's values, after four blocks


class Linear:
    """x_i = a_i z_i + Σ_{j<i} N_ij x_j, one value a token: a block whose errors are known."""

    ragged = False

    def __init__(self, matrix: Tensor, scale: Tensor):
        self.matrix, self.scale = matrix.tril(-1), scale

    def begin(self, z: Tensor, condition: Condition = Condition(), reuse: Any = None) -> Any:  # noqa: B008
        return SimpleNamespace(x=z.clone(), z=z, condition=condition, token_log_det=torch.zeros(z.shape[:2]))

    def exact(self, z: Tensor) -> Tensor:
        T = len(self.matrix)
        return torch.linalg.solve_triangular(torch.eye(T) - self.matrix, (self.scale * z[..., 0]).T, upper=False).T

    def fixed_point(self, state: Any, start: int, stop: int) -> Moved:
        new = self.scale * state.z[..., 0] + state.x[..., 0] @ self.matrix.T
        change = (new - state.x[..., 0]).abs()[:, start:stop]
        state.x[:, start:stop, 0] = new[:, start:stop]
        return Moved(change, change / self.scale[start:stop])


def linear(seed: int, growth: float, T: int = 24) -> Linear:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(T, generator=generator) + 0.5
    scale[0] = 1
    return Linear(growth * torch.randn(T, T, generator=generator, dtype=torch.float64) / T**0.5, scale.double())


@pytest.mark.parametrize("growth", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("window", [4, 23])
@pytest.mark.parametrize("seed", range(4))
def test_stated_errors_of_a_linear_block_are_above_the_true_ones(growth: float, window: int, seed: int) -> None:
    engine = linear(seed, growth)
    z = torch.randn(8, 24, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    off = 1e-3 * torch.randn(z.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    off[:4] = 0
    state = engine.begin(z + off)
    solution = adaptive(engine, state, tol=1e-3, window=window, least=1.0)  # type: ignore[arg-type]
    stated = errors(engine, state, solution.shown, SAFETY * off.abs()[..., 0])  # type: ignore[arg-type]
    true = (state.x[..., 0] - engine.exact(z)).abs()
    assert stated is not None
    assert (true.amax(1) <= stated.amax(1)).all()
    assert (stated.amax(1) <= 1e4 * true.amax(1)).all()  # it says something
    assert (true > 0).any()


@pytest.mark.parametrize("growth", [0.3, 1.0])
def test_a_block_that_was_solved_exactly_passes_errors_on(growth: float) -> None:
    engine, z = linear(3, growth), torch.randn(5, 24, 1, dtype=torch.float64)
    off = 1e-4 * torch.randn(5, 24, 1, dtype=torch.float64)
    state = engine.begin(z + off)
    state.x[..., 0] = engine.exact(z + off)
    x = state.x.clone()
    stated = errors(engine, state, None, SAFETY * off.abs()[..., 0])  # type: ignore[arg-type]
    assert stated is not None
    assert (stated.amax(1) >= (x[..., 0] - engine.exact(z)).abs().amax(1)).all()
    assert torch.equal(state.x, x)
    assert errors(engine, state, None, None) is None  # type: ignore[arg-type]
    assert (probe(engine, state).values[MOVED] == -1).all()  # type: ignore[arg-type]


def test_errors_beyond_what_tol_promises_are_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("tarflow_fast.solvers.adaptive"), "GROWTH", 10)
    engine, z = linear(1, 3.0), torch.randn(6, 24, 1, dtype=torch.float64)
    found = []
    for least in (1.0, 1e-12):  # with the first there is nothing to go on with
        state = engine.begin(z)
        solution = adaptive(engine, state, tol=1e-4, least=least)  # type: ignore[arg-type]
        found.append(((state.x[..., 0] - engine.exact(z)).abs().max().item(), solution.passes))
    (rough, few), (fine, more) = found
    assert rough > 1e-4
    assert fine < 1e-6
    assert few < more


def test_a_residual_that_is_nan_is_reported_as_nan() -> None:
    for order in ([1.0, torch.nan], [torch.nan, 1.0]):
        report = BlockReport()
        for value in order:
            report.add(Solution(1, 1, 0, torch.tensor([0.0, value]), 1))
        assert report.residual != report.residual


def test_rounding_grows_with_guidance() -> None:
    state: Any = SimpleNamespace(x=torch.zeros(1, 2, 1), condition=Condition(None, Guidance(3.0)))
    assert Trail(state).rounding == 7 * torch.finfo(torch.float32).eps


def test_rounding_is_that_of_weights_and_cache_and_what_is_kept_that_of_the_stream() -> None:
    state: Any = SimpleNamespace(x=torch.zeros(1, 2, 1), condition=Condition())
    trail = Trail(state, torch.bfloat16, tol=3e-3)
    assert trail.rounding == torch.finfo(torch.bfloat16).eps
    assert torch.equal(torch.as_tensor(trail.least(torch.ones(2))), torch.full((2,), 3e-3))


def test_rounding_grows_as_errors_do_where_every_token_was_evaluated_from_final_ones() -> None:
    engine, z = linear(2, 4.0), torch.randn(4, 24, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    state = engine.begin(z)
    shown = adaptive(engine, state, tol=0.0, dtype=torch.float32).shown  # type: ignore[arg-type]
    assert shown is not None
    assert not shown.defect.any()
    assert not shown.errors(rounding=False).any()
    floor = torch.finfo(torch.float32).eps * state.x.abs()[..., 0].clamp(min=1)
    wanted = engine.exact(z)
    off = floor * (2 * torch.randint(2, floor.shape, generator=torch.Generator().manual_seed(0)) - 1)
    off[:, 0] = 0  # the first token is given
    moved = engine.exact(z + (off / engine.scale).unsqueeze(-1))
    true = (moved - wanted).abs().amax(1)
    assert (true > floor.amax(1)).all()
    assert (SAFETY * shown.errors().amax(1) >= true).all()


def test_errors_as_large_as_the_tokens_are_unknown() -> None:
    """Beyond the range where the passes have shown anything, in this block or in one before."""
    engine, z = linear(1, 1.0), torch.randn(3, 24, 1, dtype=torch.float64)
    state = engine.begin(z)
    solution = adaptive(engine, state, tol=1e-3, least=1.0)  # type: ignore[arg-type]
    off = torch.tensor([0.0, 1e3, torch.inf]).view(3, 1).expand(3, 24)
    stated = errors(engine, state, solution.shown, off)  # type: ignore[arg-type]
    assert stated is not None
    assert stated.amax(1).isinf().tolist() == [False, True, True]
    assert not stated.isnan().any()


def test_a_block_whose_tokens_did_not_move_passes_errors_on() -> None:
    engine, z = linear(1, 0.0), torch.zeros(2, 24, 1, dtype=torch.float64)  # the guess is the solution
    state = engine.begin(z)
    shown = adaptive(engine, state, tol=1e-3).shown  # type: ignore[arg-type]
    assert shown is not None
    assert (shown.errors(torch.full((2, 24), 1e-3)) >= 1e-3).all()


def test_the_device_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads, shown = [], Trail.shown
    monkeypatch.setattr(Trail, "shown", lambda trail, x: reads.append(1) or shown(trail, x))
    model = TarFlow.from_config(TarFlowConfig(1, 8, 2, 32, 4, 1, head_dim=16))
    Sampler(model, backend="torch", solver="adaptive").sample(2)
    assert len(reads) == 4  # blocks, none of which went on with less


def held(n: int, guidance: float, seed: int) -> None:
    """The promise of the README for images of the shipped model."""
    how: Any = {"labels": [*range(10), -1], "guidance": guidance, "seed": seed, "on_nonfinite": "redraw"}
    backend = "torch" if cpu_missing() else "cpu"
    exact, fast = (
        Sampler(load_pretrained(), backend=backend, solver=solver).sample(n, **how)
        for solver in ("sequential", "adaptive")
    )
    assert not exact.error.any()
    true = (fast.images - exact.images).abs().flatten(1).amax(1)
    assert (true <= 1e-3).all()
    assert (true <= fast.error + ROUNDING).all()


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_images_are_as_near_as_stated(guidance: float) -> None:
    held(24, guidance, seed=3)


@pytest.mark.parametrize("nvp", [False, True])
@pytest.mark.parametrize(("loud", "tol"), [(3.0, 1e-1), (6.0, 0.0), (8.0, 1e-2)])
def test_images_of_models_that_blow_up_are_as_near_as_stated(nvp: bool, loud: float, tol: float) -> None:
    """Volume-preserving ones have values of 1e9 and more, and few tokens show how they grow."""
    model = random_model(3, num_blocks=3, img_size=16, nvp=nvp)
    with torch.no_grad():
        for block in model.blocks:
            block.proj_out.weight.mul_(1.0 if nvp else loud)
    exact, fast = (
        Sampler(model, backend="torch", solver=solver, tol=tol if solver == "adaptive" else None).sample(4)
        for solver in ("sequential", "adaptive")
    )
    true = (fast.images - exact.images).abs().flatten(1).amax(1)
    last_place = torch.finfo(torch.float32).eps * exact.images.abs().flatten(1).amax(1)
    assert (true <= fast.error + last_place).all()


@pytest.mark.slow
def test_bf16_images_are_as_near_as_stated() -> None:
    exact, fast = (
        Sampler(load_pretrained(), backend="torch", solver=solver, dtype=torch.bfloat16).sample(8, range(8))
        for solver in ("sequential", "adaptive")
    )
    true = (fast.images - exact.images).abs().flatten(1).amax(1)
    assert (true <= fast.error).all()
    assert fast.error.median() < 1  # it says something


@pytest.mark.slow
@pytest.mark.parametrize(("n", "guidance"), [(512, 0.0), (256, 1.0), (256, 3.0), (256, 8.0)])
def test_many_images_are_as_near_as_stated(n: int, guidance: float) -> None:
    held(n, guidance, seed=0)
