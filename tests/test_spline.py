"""The rational-quadratic spline against the reference: both ways, in PyTorch and in the native module."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import SETS, cases
from splines import LAWS, NO_LEAST_SIZE, random_splines
from tolerances import SAME_F32, SAME_F64, assert_close
from torch import Tensor

from tarflow_fast import reference
from tarflow_fast.backend.cpu.engine import cpu_missing
from tarflow_fast.errors import ArgumentError, BackendError
from tarflow_fast.spline import SplineLaw, knots, spline, spline_native

Spline = Callable[..., tuple[Tensor, Tensor]]


def native(isa: str) -> Spline:
    return lambda *arguments, **options: spline_native(*arguments, **options, instruction_set=isa)


every_way = pytest.mark.parametrize("way", [pytest.param(spline, id="torch"), *cases(of=native, name="cpu, {}".format)])
every_law = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
spreads = pytest.mark.parametrize("spread", [1, 30, 1000])


@every_way
@every_law
@spreads
def test_forward_is_the_reference(way: Spline, law: SplineLaw, spread: float) -> None:
    parameters, x = random_splines(law, 301, spread)
    y, log_derivative = way(parameters, x, law)
    wanted, wanted_log = reference.spline(x, reference.spline_knots(parameters, **asdict(law)))
    assert_close(y, wanted, SAME_F64)
    assert_close(log_derivative, wanted_log, 1e-8)


@every_way
@every_law
@spreads
def test_inverse_is_the_reference(way: Spline, law: SplineLaw, spread: float) -> None:
    """It is that to the rounding of y, of which the inverse makes as much more as the spline is flat."""
    parameters, y = random_splines(law, 301, spread)
    x, log_derivative = way(parameters, y, law, inverse=True)
    at = reference.spline_knots(parameters, **asdict(law))
    wanted, wanted_log = reference.spline_inverse(y, at)
    assert (((x - wanted) / (1 + wanted_log.exp())).abs() <= 1e-13 * (law.high - law.low)).all()
    assert_close(log_derivative, -reference.spline(x, at)[1], 1e-8)


@every_way
@pytest.mark.parametrize("inverse", [False, True])
@every_law
@spreads
def test_fp32_is_within_1e_5_of_fp64(way: Spline, inverse: bool, law: SplineLaw, spread: float) -> None:
    parameters, value = random_splines(law, 301, spread, dtype=torch.float32)
    exact, exact_log = spline(parameters.double(), value.double(), law, inverse=inverse)
    image, log_derivative = way(parameters, value, law, inverse=inverse)
    assert image.dtype == log_derivative.dtype == torch.float32
    assert_close(image, exact, SAME_F32)
    assert_close(log_derivative, exact_log, SAME_F32)


@every_way
@pytest.mark.parametrize("inverse", [False, True])
@spreads
def test_bins_without_size_do_no_harm(way: Spline, inverse: bool, spread: float) -> None:
    """Values stay in the interval and in order, and no number is missing."""
    parameters, value = random_splines(NO_LEAST_SIZE, 301, spread)
    value = value.clamp(-2, 2)
    image, log_derivative = way(parameters, value, NO_LEAST_SIZE, inverse=inverse)
    further = way(parameters, (value + 0.01).clamp(max=2), NO_LEAST_SIZE, inverse=inverse)[0]
    assert log_derivative.isfinite().all()
    assert (image >= -2 - 1e-14).all()
    assert (image <= further + 1e-14).all()
    assert (further <= 2 + 1e-14).all()


@every_way
@spreads
@pytest.mark.parametrize("bins", [1, 2, 5])
def test_the_end_comes_back(way: Spline, bins: int, spread: float) -> None:
    """The image of an end of the interval is not beyond it, however its terms are rounded."""
    for low, high in ((0.0, 1.0), (-0.1, 0.3)):
        law = replace(SplineLaw.nflows(bins, None), low=low, high=high)
        parameters, _ = random_splines(law, 1000, spread)
        for end, inverse in itertools.product((low, high), (False, True)):
            image, _ = way(parameters, torch.full((1000,), end, dtype=torch.float64), law, inverse=inverse)
            assert ((image >= low) & (image <= high)).all()
            assert way(parameters, image, law, inverse=not inverse)[0].isfinite().all()


def laws_of(bins: int) -> list[SplineLaw]:
    least = {"min_bin_width": 0.9 / bins, "min_bin_height": 0.1 / bins, "min_derivative": 1e-4}
    zuko = [SplineLaw.zuko(bins, bound, slope) for bound in (0.5, 50.0) for slope in (1e-4, 1e-3, 0.1)]
    return [*zuko, SplineLaw.nflows(bins, 20.0), SplineLaw.nflows(bins, 1.0, **least), SplineLaw.nflows(bins, None)]


@settings(max_examples=60, deadline=None)
@given(
    law=st.integers(1, 12).map(laws_of).flatmap(st.sampled_from),
    spread=st.sampled_from([0.0, 1.0, 10.0, 1e3, 1e6]),
    seed=st.integers(0, 2**31),
    beside=st.sampled_from([None, 0.0, -99.0, 99.0]),
)
def test_laws(law: SplineLaw, spread: float, seed: int, beside: float | None) -> None:
    """The inverse undoes it, it rises, its log-derivative is autograd's, and no way differs.

    beside: where values are that are next to a knot, or 0, those of the knots themselves, or None, any.
    """
    parameters, x = random_splines(law, 40, spread, seed=seed)
    at, span = knots(parameters, law), law.high - law.low
    if beside is not None:
        x = at.x[:, seed % (law.bins + 1)].clone()
        x = torch.nextafter(x, torch.full_like(x, beside)) if beside else x
        x = x if law.tails else x.clamp(law.low, law.high)
    x.requires_grad_()
    y, log_derivative = spline(parameters, x, law)
    assert y.isfinite().all()
    (slope,) = torch.autograd.grad(y.sum(), x)
    terms = at.derivative.amax(-1) + (at.y.diff() / at.x.diff()).amax(-1)  # of which autograd takes differences
    assert (((slope - log_derivative.exp()) / terms).abs() <= 1e-12).all()
    further = x.detach() + 1e-3 * span
    further = further if law.tails else further.clamp(max=law.high)
    for way in (spline, *map(native, SETS)):
        assert (way(parameters, further, law)[0] >= y - 1e-15 * span).all()
        back, inverse_log = way(parameters, y.detach(), law, inverse=True)
        assert (((back - x) / (1 + (-log_derivative).exp())).abs() <= 1e-14 * span).all()  # y's rounding, magnified
        forth, log_there = spline(parameters, back, law)
        assert (((forth - y) / (1 + log_there.exp())).abs() <= 1e-14 * span).all()
        # A step in x changes the slope so much, on either side of a knot.
        bends = [bend(parameters, back + step, law) for step in (-1e-14 * span, 0.0, 1e-14 * span)]
        least = 1e-8 if spread <= 10 else 1e-4
        assert ((inverse_log + log_there).abs() <= least + 1e-14 * span * torch.stack(bends).amax(0)).all()


def bend(parameters: Tensor, x: Tensor, law: SplineLaw) -> Tensor:
    """Returns |d log-derivative / dx|."""
    x = (x if law.tails else x.clamp(law.low, law.high)).detach().requires_grad_()
    return torch.autograd.grad(spline(parameters, x, law)[1].sum(), x)[0].abs()


@every_way
def test_knots_and_bounds_are_fixed(way: Spline) -> None:
    """At a knot the value is the knot's, and at the bound the bound itself, in both dtypes and however steep."""
    for law in LAWS.values():
        for dtype in (torch.float32, torch.float64):
            parameters, _ = random_splines(law, 50, 30.0, dtype=dtype)
            at = knots(parameters.double(), law)
            for k in range(law.bins + 1):
                y, _ = way(parameters.double(), at.x[:, k].contiguous(), law)
                assert_close(y, at.y[:, k], SAME_F64)
            for end in (law.low, law.high):
                bound = torch.full((50,), end, dtype=dtype)
                for inverse in (False, True):
                    assert_close(way(parameters, bound, law, inverse=inverse)[0], bound, 1e-14)


@every_way
def test_values_outside(way: Spline) -> None:
    """They stay, infinite ones too; without tails they have no image."""
    law = LAWS["zuko"]
    value = torch.tensor([-torch.inf, -5.001, 5.001, 1e30, torch.inf])
    parameters, _ = random_splines(law, 5, 1.0, dtype=torch.float32)
    bounded = LAWS["nflows, no tails"]
    for inverse in (False, True):
        image, log_derivative = way(parameters, value, law, inverse=inverse)
        assert torch.equal(image, value)
        assert torch.equal(log_derivative, torch.zeros(5))
        narrow = random_splines(bounded, 5, 1.0, dtype=torch.float32)[0]
        for of in way(narrow, value, bounded, inverse=inverse):
            assert of.isnan().all()


@every_way
@pytest.mark.parametrize("inverse", [False, True])
def test_a_nan_stays(way: Spline, inverse: bool) -> None:
    """That of a value, and of any parameter of a value's spline that the value depends on."""
    law = LAWS["nflows"]
    parameters, _ = random_splines(law, 4, 1.0)
    parameters[1, 3] = parameters[2, 13] = torch.nan
    value = torch.tensor([torch.nan, 0.3, 0.3, 0.3], dtype=torch.float64)
    for of in way(parameters, value, law, inverse=inverse):
        assert of.isnan().tolist() == [True, True, True, False]


@pytest.mark.parametrize("inverse", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    "name", ["zuko", *(pytest.param(name, marks=pytest.mark.slow) for name in ("nflows, divided", "nflows, no tails"))]
)
def test_gradients(name: str, inverse: bool) -> None:
    """First and second derivatives are those of finite differences, of parameters and values."""
    law = LAWS[name]
    parameters, value = random_splines(law, 12, 1.0, seed=4)
    inside = slice(4, None)  # at the ends the second derivative jumps
    arguments = parameters[inside].requires_grad_(), value[inside].requires_grad_()

    def function(parameters: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return spline(parameters, value, law, inverse=inverse)

    assert torch.autograd.gradcheck(function, arguments, eps=1e-7, atol=1e-5)
    assert torch.autograd.gradgradcheck(function, arguments, eps=1e-7, atol=1e-4, rtol=1e-3)


def test_gradients_of_extreme_splines_are_finite() -> None:
    law = LAWS["nflows"]
    parameters, y = random_splines(law, 200, 1000.0)
    parameters.requires_grad_()
    image, log_derivative = spline(parameters, y.requires_grad_(), law, inverse=True)
    (image.sum() + log_derivative.sum()).backward()
    assert parameters.grad is not None
    assert y.grad is not None
    assert parameters.grad.isfinite().all()
    assert y.grad.isfinite().all()


@every_way
def test_shapes(way: Spline) -> None:
    """Any leading dimensions, none, and no values at all."""
    law = LAWS["zuko"]
    for shape in [(), (0,), (2, 3), (2, 0, 3), (17,)]:
        for of in way(torch.zeros(*shape, law.parameters), torch.zeros(shape), law):
            assert of.shape == shape
    parameters, value = random_splines(law, 6, 1.0)
    strided = parameters.T.contiguous().T
    assert torch.equal(way(strided, value, law)[0], way(parameters, value, law)[0])
    if way is spline:  # parameters of many values
        assert torch.equal(spline(parameters[0], value, law)[0], spline(parameters[0].expand(6, -1), value, law)[0])


def test_refusals() -> None:
    law = LAWS["zuko"]
    good = torch.zeros(3, law.parameters), torch.zeros(3)
    with pytest.raises(ArgumentError, match=r"parameters: .*23 values in the last dimension"):
        spline(good[0][:, 1:], good[1], law)
    with pytest.raises(ArgumentError, match=r"parameters: .*torch.float32"):
        spline(good[0].double(), good[1], law)
    for name, value in {
        "bins": 0,
        "high": -6.0,
        "min_width": 0.2,
        "min_height": -0.1,
        "soft_clip": -1.0,
        "divisor": 0.0,
    }.items():
        with pytest.raises(ArgumentError, match=name):
            replace(law, **{name: value})
    if cpu_missing():
        pytest.skip("the native module was not built")
    with pytest.raises(ArgumentError, match=r"parameters: .*\(3, 23\)"):
        spline_native(good[0][:2], good[1], law)
    with pytest.raises(ArgumentError, match="float32 or float64"):
        spline_native(good[0].bfloat16(), good[1].bfloat16(), law)
    with pytest.raises(ArgumentError, match="parameters"):
        spline_native(good[0].double(), good[1], law)
    with pytest.raises(BackendError):
        spline_native(*good, law, instruction_set="none")
