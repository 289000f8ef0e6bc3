"""FFJORD: densities of fields whose flow is known, estimates of the trace, and both ways to a gradient."""

from __future__ import annotations

import math

import pytest
import torch
from tolerances import STANDARD_ERRORS, assert_close
from torch import Tensor, nn

from tarflow_fast.errors import ArgumentError, ODEDiverged
from tarflow_fast.flows import build
from tarflow_fast.flows.cnf import CNF

MATRIX = torch.tensor([[0.4, -1.1], [0.7, -0.3]], dtype=torch.float64)


class Linear(nn.Module):
    """v = A x, whose flow is x₁ = exp(A) x₀."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(MATRIX.clone())

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        return x @ self.matrix.T


def small(dims: int = 2, **options: object) -> CNF:
    """Returns a float64 model with random weights."""
    model = build("cnf", data_shape=(dims,), **{"width": 12, "blocks": 1, "tolerance": 1e-7, **options})
    assert isinstance(model, CNF)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * torch.randn(weight.shape)
    return model.double()


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_a_linear_field_has_the_density_of_its_gaussian(trace: str) -> None:
    model = small(trace=trace)
    model.velocity = Linear()
    x = torch.randn(2000 if trace == "hutchinson" else 20, 2, dtype=torch.float64)
    flow = torch.linalg.matrix_exp(MATRIX)
    wanted = torch.distributions.MultivariateNormal(torch.zeros(2).double(), flow @ flow.T).log_prob(x)
    with torch.no_grad():
        found = model.log_prob(x, generator=torch.Generator().manual_seed(1))
    if trace == "exact":
        assert_close(found, wanted, 1e-5)
        return
    difference = found - wanted
    assert difference.std() > 0.1
    assert abs(float(difference.mean())) < STANDARD_ERRORS * float(difference.std()) / math.sqrt(len(x))


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_the_estimated_density_is_the_exact_one_on_average(noise: str) -> None:
    model = small(4, trace="hutchinson", noise=noise, solver="rk4", steps=4)
    exact = small(4, trace="exact", solver="rk4", steps=4)
    exact.load_state_dict(model.state_dict())
    x = torch.randn(1, 4, dtype=torch.float64).expand(2000, 4)
    with torch.no_grad():
        estimates = model.log_prob(x, generator=torch.Generator().manual_seed(1))
        wanted = exact.log_prob(x[:1])
    error = float(estimates.std()) / math.sqrt(len(x))
    assert abs(float(estimates.mean() - wanted[0])) < STANDARD_ERRORS * error


@pytest.mark.slow
@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_the_adjoint_has_the_gradient_of_the_steps(trace: str) -> None:
    x, gradients = torch.randn(8, 2, dtype=torch.float64), []
    weights = small().state_dict()
    for adjoint in (False, True):
        model = small(trace=trace, adjoint=adjoint, training_tolerance=1e-9, tolerance=1e-9)
        model.load_state_dict(weights)
        model.loss(x, generator=torch.Generator().manual_seed(1)).backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
    assert_close(gradients[1], gradients[0], 1e-6)


def test_the_loss_is_the_likelihood_and_the_energy_of_trajectories() -> None:
    x = torch.randn(8, 2, dtype=torch.float64)
    model = small(kinetic=0.0, training_tolerance=1e-7)
    plain = model.loss(x)
    assert_close(plain, -model.log_prob(x).mean() / 2, 1e-6)
    kinetic = small(kinetic=0.5, training_tolerance=1e-7)
    kinetic.load_state_dict(model.state_dict())
    # the energy of the same trajectories, by a sum over small steps
    with torch.no_grad():
        at, energy = x, torch.zeros(8, dtype=torch.float64)
        for step in range(2000):
            v = model.velocity(at, torch.tensor(1 - (step + 0.5) / 2000).double(), None)
            at, energy = at - v / 2000, energy + v.square().sum(1) / 2000
    assert_close(kinetic.loss(x), plain + 0.5 * energy.mean() / 2, 1e-3)


@pytest.mark.slow
def test_training_lowers_the_loss_and_reports_evaluations() -> None:
    model = build("cnf", data_shape=(2,), width=16, blocks=1)
    x = torch.randn(128, 2) * torch.tensor([0.3, 2.0]) + 1
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = model.loss(x)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3
    with torch.no_grad():
        model.log_prob(x)
    assert 10 < model.evaluations() < 200


def test_a_field_that_explodes_is_an_error_by_name_in_training_too() -> None:
    class Exploding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Parameter(torch.full((), -50.0, dtype=torch.float64))

        def forward(self, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
            return self.rate * x.pow(3)

    for adjoint in (False, True):
        model = small(adjoint=adjoint, max_evaluations=500)
        model.velocity = Exploding()
        with pytest.raises(ODEDiverged, match="the ODE diverged at t = "):
            model.loss(torch.randn(8, 2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("option", "value"),
    [("training_tolerance", 0.0), ("kinetic", -1.0), ("trace", "slq"), ("noise", "cauchy"), ("width", 0)],
)
def test_options_out_of_range_are_refused(option: str, value: object) -> None:
    with pytest.raises(ArgumentError, match=rf"^{option}: expected"):
        build("cnf", data_shape=(2,), **{option: value})
