"""Rectified flow: its stages, the pairs it makes, and trajectories that a reflow straightens."""

from __future__ import annotations

import copy

import pytest
import torch
from tolerances import SAME_F32, assert_close
from torch import Tensor

from tarflow_fast.errors import ArgumentError
from tarflow_fast.flows import build
from tarflow_fast.flows.ode import ODE
from tarflow_fast.flows.rectified import RectifiedFlow

STEPS = 400


def small(classes: int = 0, **options: object) -> RectifiedFlow:
    options = {"width": 32, "blocks": 1, "solver": "rk4", "steps": 8, "pairs": 2048, **options}
    model = build("rectified", data_shape=(2,), num_classes=classes, **options)
    assert isinstance(model, RectifiedFlow)
    return model


def two_clouds(n: int, generator: torch.Generator) -> Tensor:
    side = torch.randint(0, 2, (n, 1), generator=generator) * 4.0 - 2
    return 0.3 * torch.randn(n, 2, generator=generator) + torch.cat([side, torch.zeros_like(side)], dim=1)


def test_a_reflow_straightens_trajectories_and_keeps_the_samples() -> None:
    model, generator = small(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for step in range(2 * STEPS):
        model.at_step(step, 2 * STEPS)
        if step == STEPS:
            before, first = model.straightness(512, generator=generator), copy.deepcopy(model)
        optimizer.zero_grad()
        model.loss(two_clouds(256, generator), generator=generator).backward()
        optimizer.step()
    after = model.straightness(512, generator=generator)
    assert after < before / 3

    def one_step_error(flow: RectifiedFlow) -> float:
        seeds = [torch.Generator().manual_seed(2) for _ in range(2)]
        return float(
            (flow.sample(500, generator=seeds[0], ode=ODE("euler", 1)) - flow.sample(500, generator=seeds[1])).norm()
        )

    assert one_step_error(model) < one_step_error(first) / 2
    assert model.figures(generator)["straightness"] == pytest.approx(after, abs=0.05)
    x = model.sample(2000, generator=generator)
    assert 0.35 < float((x[:, 0] > 0).float().mean()) < 0.65
    assert_close(x[:, 0].abs().mean(), torch.tensor(2.0), 0.25)


@pytest.mark.parametrize("reflows", [0, 1, 3])
def test_a_run_is_shared_out_equally(reflows: int) -> None:
    model = small(reflows=reflows)
    stages = []
    for step in range(8):
        model.at_step(step, 8)
        stages.append(int(model.stage))
    assert stages == [step * (reflows + 1) // 8 for step in range(8)]


def test_the_teacher_is_the_velocity_of_the_stage_before() -> None:
    model, x = small(), torch.randn(4, 2)
    with torch.no_grad():
        for weight in model.velocity.parameters():
            weight += 0.1 * torch.randn(weight.shape)
    model.reflow()
    t = torch.full((), 0.4)
    assert torch.equal(model.teacher(x, t, None), model.velocity(x, t, None))
    with torch.no_grad():
        next(model.velocity.parameters()).add_(1)
    assert not torch.equal(model.teacher(x, t, None), model.velocity(x, t, None))
    assert not any(name.startswith("teacher") for name, _ in model.named_parameters())
    assert any(name.startswith("teacher") for name in model.state_dict())


def test_pairs_are_noise_and_what_the_ode_makes_of_it_with_their_classes() -> None:
    model, y = small(classes=2, pairs=20), torch.tensor([0, 1] * 4)
    with torch.no_grad():
        for weight in model.velocity.parameters():
            weight += 0.1 * torch.randn(weight.shape)
    model.reflow()
    for _ in range(5):
        model.loss(torch.randn(8, 2), y, generator=torch.Generator().manual_seed(1))
    z, x, context = model._pairs
    assert len(z) == len(x) == len(context) == 24, "made a batch at a time until there are enough"
    assert_close(x, model.solve(z, context, model.ode), SAME_F32)
    assert torch.equal(context.argmax(1), y.repeat(3))


def test_a_run_that_goes_on_makes_pairs_of_the_same_teacher() -> None:
    model, resumed = small(), small()
    with torch.no_grad():
        for weight in model.velocity.parameters():
            weight += 0.1 * torch.randn(weight.shape)
    model.reflow()
    with torch.no_grad():
        next(model.velocity.parameters()).add_(1)  # trained on after the reflow
    resumed.load_state_dict(model.state_dict())
    resumed.at_step(5, 8)
    x = torch.randn(8, 2)
    losses = [float(each.loss(x, generator=torch.Generator().manual_seed(1)).detach()) for each in (model, resumed)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("option", "value"), [("reflows", -1), ("pairs", 0)])
def test_options_out_of_range_are_refused(option: str, value: int) -> None:
    with pytest.raises(ArgumentError, match=f"{option}: expected"):
        small(**{option: value})
