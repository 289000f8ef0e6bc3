"""Passes of the CUDA engine without the host: its frontier is that of the adaptive solver."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import KERNEL_DEVICE, random_latents, random_model
from cuda_engines import engine_of
from engines import GUIDED, expected, poisoned
from tolerances import GOLDEN, assert_close

from tarflow_fast import Sampler
from tarflow_fast.backend.cuda.engine import CudaEngine
from tarflow_fast.engine import Condition, Guidance
from tarflow_fast.errors import ArgumentError
from tarflow_fast.solvers.frontier import Frontier
from tarflow_fast.solvers.trail import SCALE, SENSITIVITY, Trail


def by_the_host(frontier: Frontier, window: int, most: int = 1000) -> int:
    """`Frontier.run` of an engine that does not do it by itself."""
    passes = 0
    while frontier.slowest < frontier.state.x.shape[1] and passes < most:
        frontier.advance(window)
        passes += 1
    return passes


@pytest.mark.parametrize("guidance", [Guidance(), GUIDED], ids=["unguided", "guided"])
@pytest.mark.parametrize("tol", [0.0, pytest.param(1e-3, marks=pytest.mark.slow), 0.1])
@pytest.mark.parametrize(
    ("batch", "window"), [(1, 15), (3, 1), (3, 5), pytest.param(5, 15, marks=pytest.mark.slow), (2, 32)]
)
def test_the_frontier_on_the_device_is_the_hosts(guidance: Guidance, tol: float, batch: int, window: int) -> None:
    """As many passes and evaluations, and the same tokens, also where samples need several launches."""
    model = random_model(6, num_classes=2, channels=32, head_dim=16)
    condition = Condition(torch.arange(batch) % 3 - 1, guidance)
    engine, z = engine_of(model), random_latents(model, batch)
    states = [poisoned(engine, z, condition) for _ in range(2)]
    for state in states:
        state.x.copy_(z)
    frontier, wanted = (Frontier(engine, state, tol) for state in states)
    moved: list[int] = []
    for most in (5, 100):  # later tokens move by their rounding alone, if no tol keeps them
        assert frontier.run(window, most, progress=moved.append) == by_the_host(wanted, window, most)
        trails = [of.trail.values.nan_to_num(posinf=0) for of in (frontier, wanted)]
        if most == 5 or tol:
            assert_close(*trails, 2e-3)
        else:
            assert_close(trails[0][:SCALE], trails[1][:SCALE], 0.2)  # the scale is a quotient of two roundings then
    assert sum(moved) == model.config.num_patches - 1
    assert frontier.reached == wanted.reached
    assert frontier.evaluations == wanted.evaluations
    assert_close(frontier.residual, wanted.residual, GOLDEN)
    assert torch.equal(frontier.trail.values.isinf(), wanted.trail.values.isinf())
    if tol < 0.1 and window > 1:
        assert (wanted.trail.values[SENSITIVITY] > 0).any()
    assert_close(states[0].x, states[1].x, GOLDEN)
    assert_close(states[0].token_log_det, states[1].token_log_det, GOLDEN)
    if tol == 0:
        assert_close(states[0].x, expected(model, 0, z, condition)[0], GOLDEN)


def test_a_frontier_may_stop_and_go_on() -> None:
    model = random_model(6)
    engine, z = engine_of(model), random_latents(model, 2)
    states = [engine.begin(z, Condition()) for _ in range(2)]
    frontier, wanted = (Frontier(engine, state, 1e-3) for state in states)
    for most in (1, 2, 100):
        assert frontier.run(7, most) == by_the_host(wanted, 7, most)
        assert frontier.reached == wanted.reached
        assert_close(states[0].x, states[1].x, GOLDEN)
    assert frontier.reached == [16, 16]
    assert frontier.run(7) == 0


@pytest.mark.parametrize("patch", [5, 11, 15])
def test_tokens_of_any_size(patch: int) -> None:
    """Of fewer values than a warp takes in one round, or more."""
    model = random_model(6, img_size=3 * patch, patch_size=patch)
    engine, z = engine_of(model), random_latents(model, 2)
    states = [engine.begin(z, Condition()) for _ in range(2)]
    frontier, wanted = (Frontier(engine, state, 1e-3) for state in states)
    assert frontier.run(5) == by_the_host(wanted, 5)
    assert_close(states[0].x, states[1].x, GOLDEN)
    assert_close(states[0].token_log_det, states[1].token_log_det, GOLDEN)
    got, trail = (of.trail.values.nan_to_num(posinf=0) for of in (frontier, wanted))
    scale = trail.abs().clamp(min=1)
    assert_close(got / scale, trail / scale, 2e-3)
    engine.reverse(states[0])
    assert_close(states[0].x, expected(model, 0, z, Condition())[0], GOLDEN)


@pytest.mark.parametrize("where", ["guess", "final"])
def test_a_frontier_with_overflowing_tokens_is_the_hosts(where: str) -> None:
    """A guess that overflows begins again; a sample whose final token does has failed, and no other one."""
    model = random_model(6, img_size=6)
    with torch.no_grad():
        model.blocks[0].proj_out.weight[:4].mul_(60.0 if where == "final" else 25.0)
    engine, z = engine_of(model), random_latents(model, 4) * (3.0 if where == "final" else 1.0)
    states = [engine.begin(z, Condition()) for _ in range(2)]
    frontier, wanted = (Frontier(engine, state, 1e-3) for state in states)
    assert frontier.run(8) == by_the_host(wanted, 8)
    assert frontier.reached == wanted.reached
    assert frontier.evaluations == wanted.evaluations
    finite = states[1].x.isfinite()
    assert torch.equal(states[0].x.isfinite(), finite)
    if where == "final":
        assert not finite.all()
    scale = states[1].x[finite].abs().clamp(min=1)
    assert_close(states[0].x[finite] / scale, states[1].x[finite] / scale, 1e-2)


def test_a_window_too_wide_for_the_device_is_refused() -> None:
    model = random_model()
    engine = engine_of(model)
    state = engine.begin(random_latents(model, 2), Condition(None, GUIDED))
    assert engine.max_window(state) == 32
    trail = Trail(state)
    with pytest.raises(ArgumentError, match=r"^window: expected 1 to 32, got 33"):
        engine.iterate_on_device(state, state.x, [1, 1], trail, window=33, max_passes=1)
    with pytest.raises(ArgumentError, match=r"^guess: expected shape \(2, 16, 4\), got \(2, 15, 4\)"):
        engine.iterate_on_device(state, state.x[:, 1:], [1, 1], trail, window=3, max_passes=1)
    trail.values = trail.values[1:]
    with pytest.raises(
        ArgumentError, match=r"^trail: expected a contiguous float32 tensor \(4, 2, 16\), got \(3, 2, 16\)"
    ):
        engine.iterate_on_device(state, state.x, [1, 1], trail, window=3, max_passes=1)


def test_the_adaptive_solver_takes_the_devices_frontier(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(num_classes=3)
    windows = []
    iterate = CudaEngine.iterate_on_device

    def counted(self: CudaEngine, *arguments: Any, **options: Any) -> Any:
        windows.append(options["window"])
        return iterate(self, *arguments, **options)

    monkeypatch.setattr(CudaEngine, "iterate_on_device", counted)
    sampler = Sampler(model, backend="cuda", device=KERNEL_DEVICE, solver="adaptive", tol=1e-6)
    images = sampler.sample(3, [0, 1, 2]).images
    assert windows == [15, 15]
    assert_close(images, Sampler(model, backend="torch", solver="sequential").sample(3, [0, 1, 2]).images, GOLDEN)
