"""ODEs: the order of each method, what its evaluations are, gradients both ways, and what is said of a divergence."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tolerances import SAME_F64, assert_close
from torch import Tensor, nn

from tarflow_fast.errors import ArgumentError, ODEDiverged
from tarflow_fast.flows.ode import ODE, State, integrate

ORDER = {"euler": 1, "midpoint": 2, "rk4": 4}
METHODS = (*ORDER, "dopri5", "dopri8")


class Counted:
    """ds/dt = s cos t, whose solution is s(0) exp(sin t), with the number of its evaluations."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, t: Tensor, state: State) -> State:
        self.calls += 1
        return tuple(part * t.cos() for part in state)


def start() -> State:
    return torch.linspace(0.5, 2, 6, dtype=torch.float64).reshape(3, 2), torch.ones(3, dtype=torch.float64)


def error(ode: ODE, begin: float = 0.0, end: float = 1.0) -> float:
    """Returns the largest error of the solution from `begin` to `end`."""
    found, _ = integrate(Counted(), start(), begin, end, ode)
    factor = math.exp(math.sin(end) - math.sin(begin))
    return max(float((part - factor * given).abs().max()) for part, given in zip(found, start(), strict=True))


@pytest.mark.parametrize("method", ORDER)
def test_halved_steps_divide_the_error_by_two_to_the_order(method: str) -> None:
    ratio = error(ODE(method, 16)) / error(ODE(method, 32))
    assert ratio == pytest.approx(2 ** ORDER[method], rel=0.15)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_counts_what_it_evaluates(method: str) -> None:
    field = Counted()
    _, evaluations = integrate(field, start(), 0.0, 1.0, ODE(method, 5))
    assert evaluations == field.calls
    if method in ORDER:
        assert evaluations == 5 * {"euler": 1, "midpoint": 2, "rk4": 4}[method]


@pytest.mark.parametrize("method", ["dopri5", "dopri8"])
def test_a_smaller_tolerance_gives_a_smaller_error(method: str) -> None:
    assert error(ODE(method, tolerance=1e-8)) < 1e-7
    assert error(ODE(method, tolerance=1e-8), 1.0, 0.0) < 1e-7


def test_a_projection_follows_every_fixed_step_and_ends_adaptive_ones() -> None:
    def ones(x: Tensor) -> Tensor:
        return torch.ones_like(x)

    for method in METHODS:
        (x, rest), _ = integrate(Counted(), start(), 0.0, 1.0, ODE(method, 3), project=ones)
        assert_close(x, torch.ones_like(x), 0)
        assert not torch.equal(rest, torch.ones_like(rest))


class Blowing(nn.Module):
    """ds/dt = w s², which is infinite at t = 1 / (w s(0))."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((), 4.0, dtype=torch.float64))

    def forward(self, t: Tensor, state: State) -> State:
        return tuple(self.w * part.square() for part in state)


@pytest.mark.parametrize("method", METHODS)
def test_a_divergence_is_an_error_by_name(method: str) -> None:
    with torch.no_grad(), pytest.raises(ODEDiverged, match="the ODE diverged at t = "):
        integrate(Blowing(), start(), 0.0, 2.0, ODE(method, 200))


@pytest.mark.parametrize("method", METHODS)
def test_a_nan_is_an_error_by_name(method: str) -> None:
    def broken(t: Tensor, state: State) -> State:
        return tuple(torch.where(t > 0.5, part * math.nan, part) for part in state)

    with pytest.raises(ODEDiverged):
        integrate(broken, start(), 0.0, 1.0, ODE(method))


def test_too_many_evaluations_are_an_error_that_names_their_limit() -> None:
    with pytest.raises(ODEDiverged, match="more than max_evaluations = 20 evaluations"):
        integrate(Counted(), start(), 0.0, 50.0, ODE("dopri5", max_evaluations=20))


def test_the_adjoint_ode_has_the_same_limit() -> None:
    model = Blowing()
    ode = ODE("dopri5", tolerance=1e-6, max_evaluations=1000)
    _, forward = integrate(model, start(), 0.0, 0.1, ode)
    (x, _), _ = integrate(
        model, start(), 0.0, 0.1, replace(ode, max_evaluations=forward + 3), parameters=model.parameters()
    )
    with pytest.raises(ODEDiverged, match="max_evaluations"):
        x.sum().backward()


def test_the_adjoint_ode_diverges_by_name() -> None:
    weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def rooted(t: Tensor, state: State) -> State:  # at 0 it has a value, and no derivative
        return tuple(weight * part.sqrt() for part in state)

    zero = tuple(torch.zeros_like(part) for part in start())
    (x, _), _ = integrate(rooted, zero, 0.0, 0.1, ODE("dopri5"), parameters=[weight])
    with pytest.raises(ODEDiverged, match="the ODE diverged at t = "):
        x.sum().backward()


@pytest.mark.slow
def test_the_adjoint_ode_has_the_gradients_of_the_steps() -> None:
    found = []
    for adjoint in (False, True):
        model, state = Blowing(), start()
        state[0].requires_grad_()
        parameters = model.parameters() if adjoint else None
        (x, rest), _ = integrate(model, state, 0.0, 0.1, ODE("dopri5", tolerance=1e-11), parameters=parameters)
        (x.square().sum() + rest.sum()).backward()
        found.append((model.w.grad, state[0].grad))
    for through, adjoint in zip(*found, strict=True):
        assert_close(adjoint, through, 1e-7)


def test_a_solution_is_the_same_with_a_record_of_gradients() -> None:
    model = Blowing()
    (recorded, _), _ = integrate(model, start(), 0.0, 0.1, ODE("rk4", 4))
    with torch.no_grad():
        (plain, _), _ = integrate(model, start(), 0.0, 0.1, ODE("rk4", 4))
    assert recorded.requires_grad
    assert_close(recorded, plain, SAME_F64)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("method", "rk5"), ("steps", 0), ("tolerance", 0), ("tolerance", 2), ("max_evaluations", 0)],
)
def test_settings_out_of_range_are_refused(argument: str, value: object) -> None:
    with pytest.raises(ArgumentError, match=f"^{argument}: "):
        ODE(**{argument: value})
