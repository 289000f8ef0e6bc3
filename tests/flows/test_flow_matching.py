"""Flow matching: exact velocities give exact densities, pairs are optimal, and trajectories have a straightness."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tolerances import SAME_F32, SAME_F64, STANDARD_ERRORS, assert_close
from torch import Tensor, nn

from tarflow_fast.data import FlowData
from tarflow_fast.errors import ArgumentError, ODEDiverged
from tarflow_fast.evaluation import flow_score
from tarflow_fast.flows import FamilyFlow, Preprocessed, build
from tarflow_fast.flows.flow_matching import FlowMatching, optimally_paired
from tarflow_fast.flows.ode import ODE

MEAN, STD = torch.tensor([1.0, -0.5]).double(), torch.tensor([0.5, 2.0]).double()


class ToGaussian(nn.Module):
    """The velocity that carries N(0, I) to N(MEAN, STD²) on independent straight paths: E[x₁ − x₀ | x_t = x]."""

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        t = t.expand(len(x))[:, None].to(x.dtype)
        variance = (1 - t).square() + (t * STD).square()
        return MEAN + (t * STD.square() - (1 - t)) / variance * (x - t * MEAN)


class Constant(nn.Module):
    """v = (3, 4)."""

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        return torch.tensor([3.0, 4.0], dtype=x.dtype).expand_as(x)


class Turning(nn.Module):
    """v = (−π x₂, π x₁): half a turn around 0."""

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        return math.pi * torch.stack([-x[:, 1], x[:, 0]], dim=1)


def with_velocity(velocity: nn.Module, **options: object) -> FlowMatching:
    """Returns a float64 model of the plane with this velocity."""
    model = build("flow-matching", data_shape=(2,), width=4, blocks=1, **options).double()
    assert isinstance(model, FlowMatching)
    model.place_holder = nn.Parameter(torch.zeros((), dtype=torch.float64))  # where the model is
    model.velocity = velocity
    return model


def gaussian_log_prob(x: Tensor) -> Tensor:
    return torch.distributions.Normal(MEAN, STD).log_prob(x).sum(1)


@pytest.mark.parametrize("solver", [ODE("rk4", 64), ODE("dopri5", tolerance=1e-9), ODE("dopri8", tolerance=1e-9)])
def test_the_exact_velocity_gives_the_exact_density(solver: ODE) -> None:
    model = with_velocity(ToGaussian())
    model.ode = solver
    x = MEAN + STD * torch.randn(50, 2, dtype=torch.float64)
    with torch.no_grad():
        assert_close(model.log_prob(x), gaussian_log_prob(x), 1e-5)


def test_the_exact_velocity_gives_samples_of_the_data() -> None:
    x = with_velocity(ToGaussian()).sample(20_000, generator=torch.Generator().manual_seed(1))
    scaled = (x - MEAN) / STD
    error = STANDARD_ERRORS / math.sqrt(len(x))
    assert_close(scaled.mean(0), torch.zeros(2), error)
    assert_close(scaled.square().mean(0), torch.ones(2), 2 * error)


def test_the_exact_velocity_has_the_least_loss() -> None:
    x = MEAN + STD * torch.randn(20_000, 2, dtype=torch.float64)

    def loss(velocity: nn.Module) -> float:
        with torch.no_grad():
            return float(with_velocity(velocity).loss(x, generator=torch.Generator().manual_seed(1)))

    class Off(ToGaussian):
        def forward(self, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
            return super().forward(x, t, context) + 0.3

    # an error that depends on (x_t, t) alone adds its own mean square
    assert loss(Off()) - loss(ToGaussian()) == pytest.approx(0.09, rel=0.3)


@pytest.mark.parametrize(("solver", "each"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_fixed_steps_report_their_evaluations(solver: str, each: int) -> None:
    model = with_velocity(ToGaussian(), solver=solver, steps=5)
    assert model.evaluations() is None
    x = model.sample(3, generator=torch.Generator().manual_seed(1))
    assert model.evaluations() == 5 * each
    with torch.no_grad():
        assert torch.isfinite(model.log_prob(x)).all()
    assert model.evaluations() == 5 * each
    other = model.sample(3, generator=torch.Generator().manual_seed(1), ode=ODE("euler", 1))
    assert model.evaluations() == 1
    assert not torch.equal(x, other)


def test_straight_trajectories_have_straightness_zero_and_turning_ones_that_of_a_circle() -> None:
    generator = torch.Generator().manual_seed(1)
    assert with_velocity(Constant()).straightness(100, generator=generator) == pytest.approx(0, abs=1e-6)
    # half a circle of radius r: ∫ ‖v‖² = (π r)², and the ends are 2 r apart
    found = with_velocity(Turning(), tolerance=1e-8).straightness(100, generator=generator)
    assert found == pytest.approx((math.pi**2 - 4) / 4, rel=1e-5)


def test_an_evaluation_reports_the_straightness() -> None:
    model = Preprocessed(build("flow-matching", data_shape=(2,), width=4, blocks=1, solver="euler", steps=2))
    row = flow_score(model, FlowData(torch.randn(20, 2), "vectors")).row()
    assert row["evaluations"] == 2
    assert row["straightness"] == 0, "nothing moves in a new model"


@pytest.mark.parametrize("classes", [0, 2])
def test_optimal_pairs_have_the_least_cost_of_all_permutations(classes: int) -> None:
    z, x = torch.randn(2, 6, 3, dtype=torch.float64).unbind()
    labels = torch.tensor([0, 1, 1, 0, 1, 0]) if classes else torch.zeros(6, dtype=torch.int64)
    context = torch.eye(2)[labels] if classes else None
    paired = optimally_paired(z, x, context)
    assert sorted(map(tuple, paired.tolist())) == sorted(map(tuple, z.tolist()))
    allowed = [list(p) for p in itertools.permutations(range(6)) if torch.equal(labels[list(p)], labels)]
    least = min(float((z[p] - x).square().sum()) for p in allowed)
    assert float((paired - x).square().sum()) == pytest.approx(least)
    rows = [z.tolist().index(row) for row in paired.tolist()]
    assert torch.equal(labels[rows], labels), "noise of one class stays with it"


def test_a_batch_that_is_paired_optimally_has_a_smaller_loss_at_the_start() -> None:
    x = 3 * torch.randn(64, 2)
    losses = []
    for coupling in ("independent", "optimal"):
        model = build("flow-matching", data_shape=(2,), width=4, blocks=1, coupling=coupling)  # v = 0
        losses.append(float(model.loss(x, generator=torch.Generator().manual_seed(1)).detach()))
    assert losses[1] < 0.6 * losses[0]


def test_images_use_hutchinsons_estimate_which_is_right_on_average() -> None:
    shape, rows = (1, 4, 8), 200
    model = build("flow-matching", data_shape=shape, channels=4, blocks=1, solver="euler", steps=1).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * torch.randn(weight.shape, dtype=weight.dtype)
        x = torch.randn(1, *shape, dtype=torch.float64).expand(rows, *shape)
        estimates = model.log_prob(x, generator=torch.Generator().manual_seed(1))
        exact = build("flow-matching", data_shape=shape, channels=4, blocks=1, solver="euler", steps=1, trace="exact")
        exact.double().load_state_dict(model.state_dict())
        wanted = exact.log_prob(x[:1])
    assert estimates.std() > 0
    assert abs(float(estimates.mean() - wanted[0])) < STANDARD_ERRORS * float(estimates.std()) / math.sqrt(rows)


def test_training_approaches_the_density_of_the_data() -> None:
    model: FamilyFlow = build("flow-matching", data_shape=(2,), width=32, blocks=1, solver="rk4", steps=8)
    x = (MEAN + STD * torch.randn(4000, 2, dtype=torch.float64)).float()
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(300):
        optimizer.zero_grad()
        model.loss(x[torch.randint(len(x), (256,), generator=generator)], generator=generator).backward()
        optimizer.step()
    with torch.no_grad():
        found = model.log_prob(x[:500]).mean()
    assert_close(found, gaussian_log_prob(x[:500].double()).mean(), 0.1)


def test_a_diverging_velocity_is_an_error_by_name() -> None:
    class Exploding(nn.Module):
        def forward(self, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
            return 1e3 * x.pow(3)

    for ode in (ODE(), ODE("euler", 50)):
        with pytest.raises(ODEDiverged, match="the ODE diverged"):
            with_velocity(Exploding()).sample(8, generator=torch.Generator().manual_seed(1), ode=ode)


@pytest.mark.parametrize(
    ("option", "value"),
    [("solver", "heun"), ("steps", 0), ("tolerance", 0.0), ("sigma", 2.0), ("coupling", "sinkhorn")],
)
def test_options_out_of_range_are_refused(option: str, value: object) -> None:
    with pytest.raises(ArgumentError, match=rf"^{'method' if option == 'solver' else option}: |^solver: "):
        build("flow-matching", data_shape=(2,), **{option: value})


def test_noise_that_is_left_at_the_end_is_sigma() -> None:
    model = with_velocity(Constant(), sigma=1.0)  # x_t = x₀ + t x₁, whose velocity is x₁
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64).expand(5, 2)
    assert_close(model.loss(x), torch.zeros(()), SAME_F64)
    assert with_velocity(Constant()).loss(x) > SAME_F32
