"""The spline against the libraries whose parameters it takes, and where these fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from splines import random_splines
from tolerances import SAME_F32, SAME_F64, assert_close
from torch import Tensor

from tarflow_fast.backend.cpu.engine import cpu_missing
from tarflow_fast.spline import SplineLaw, knots, spline, spline_native

WAYS = {"torch": spline} if cpu_missing() else {"torch": spline, "native": spline_native}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def parts(parameters: Tensor, law: SplineLaw) -> list[Tensor]:
    """Returns widths, heights and derivatives as new tensors: the libraries write to what they are given."""
    return [part.clone() for part in parameters.split([law.bins, law.bins, law.parameters - 2 * law.bins], dim=-1)]


@every_way
@pytest.mark.parametrize(("bound", "slope"), [(5.0, 1e-3), (1.0, 0.1)])
def test_zuko(way: Any, bound: float, slope: float) -> None:
    transforms = pytest.importorskip("zuko").transforms
    law = SplineLaw.zuko(8, bound, slope)
    parameters, value = random_splines(law, 200, 3.0)
    theirs = transforms.MonotonicRQSTransform(*parts(parameters, law), bound=bound, slope=slope)
    y, log_derivative = theirs.call_and_ladj(value)
    got = way(parameters, value, law)
    assert_close(got[0], y, SAME_F64)
    assert_close(got[1], log_derivative, SAME_F64)
    assert_close(way(parameters, value, law, inverse=True)[0], theirs.inv(value), 1e-9)


@every_way
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("library", ["nflows.transforms.splines.rational_quadratic", "normflows.utils.splines"])
@pytest.mark.parametrize("tail_bound", [3.0, None])
def test_nflows_and_normflows(way: Any, inverse: bool, library: str, tail_bound: float | None) -> None:
    """With linear tails, whose derivatives are padded, and without any; for other least sizes than the usual ones."""
    theirs = pytest.importorskip(library)
    least = {"min_bin_width": 0.01, "min_bin_height": 0.02, "min_derivative": 0.03}
    law = SplineLaw.nflows(6, tail_bound, **least)
    parameters, value = random_splines(law, 200, 3.0)
    if tail_bound is None:
        wanted, wanted_log = theirs.rational_quadratic_spline(value, *parts(parameters, law), inverse=inverse, **least)
    else:
        wanted, wanted_log = theirs.unconstrained_rational_quadratic_spline(
            value, *parts(parameters, law), inverse=inverse, tail_bound=tail_bound, **least
        )
    image, log_derivative = way(parameters, value, law, inverse=inverse)
    assert_close(image, wanted, 1e-9)
    assert_close(log_derivative, wanted_log, 1e-8)


def nflows_inverse(parameters: Tensor, y: Tensor, law: SplineLaw) -> Tensor:
    theirs = pytest.importorskip("nflows.transforms.splines.rational_quadratic")
    return theirs.unconstrained_rational_quadratic_spline(
        y, *parts(parameters, law), inverse=True, tail_bound=law.high
    )[0]


@every_way
def test_a_value_just_below_a_knot(way: Any) -> None:
    """nflows #87, sbi #373: b² and 4ac round to numbers whose difference is negative, which ends the sampling."""
    law = SplineLaw.nflows(8, 3.0)
    parameters, _ = random_splines(law, 4000, 10.0, dtype=torch.float32)
    y = torch.nextafter(knots(parameters, law).y[:, 4], torch.tensor(-9.0))
    with pytest.raises(AssertionError):
        nflows_inverse(parameters, y, law)
    x, log_derivative = way(parameters, y, law, inverse=True)
    exact, exact_log = spline(parameters.double(), y.double(), law, inverse=True)
    assert_close(x, exact, SAME_F32)
    assert_close(log_derivative, exact_log, SAME_F32)


@every_way
def test_a_value_at_a_wide_bound(way: Any) -> None:
    """In nflows the last knot is moved by 1e-6 to take the bound in, which is no move at 50 in fp32."""
    law = SplineLaw.nflows(8, 50.0)
    parameters, _ = random_splines(law, 4, 1.0, dtype=torch.float32)
    bound = torch.full((4,), 50.0)
    with pytest.raises(RuntimeError, match="out of bounds"):
        nflows_inverse(parameters, bound, law)
    assert torch.equal(way(parameters, bound, law, inverse=True)[0], bound)


@every_way
def test_a_flat_middle(way: Any) -> None:
    """Between two steep ends of a low bin, fp32 leaves nflows with an x that is off by a tenth of the bin."""
    law = SplineLaw.nflows(2, 1.0)
    parameters = torch.tensor([[0.0, 0.0, -9.0, 9.0, 3000.0], [0.0, 0.0, 9.0, -9.0, 3000.0]])
    at = knots(parameters.double(), law)
    low = torch.tensor([0, 1])
    x = at.x.gather(1, low[:, None])[:, 0] + 0.5
    y = spline(parameters.double(), x, law)[0].float()
    exact = spline(parameters.double(), y.double(), law, inverse=True)[0]
    assert_close(way(parameters, y, law, inverse=True)[0], exact, SAME_F32)


@every_way
def test_no_value_inside_and_none_outside(way: Any) -> None:
    """nflows #44 and sbi #373: values are not gathered by where they lie, so that no such set can be empty."""
    law = SplineLaw.nflows(8, 1.0)
    parameters, _ = random_splines(law, 5, 1.0)
    for value in (torch.full((5,), 2.0), torch.full((5,), 0.5), torch.empty(0)):
        value = value.double()
        of = parameters[: len(value)]
        x = way(of, value, law, inverse=True)[0]
        assert_close(way(of, x, law)[0], value, SAME_F64) if len(value) else None
        assert x.shape == value.shape
