"""Riemannian flow matching: geodesics, densities on the sphere and the torus, and points that lie off them."""

from __future__ import annotations

import math

import pytest
import torch
from family_cases import CASES, FamilyCase
from tolerances import FAMILY_INTEGRAL, FAMILY_LOG_DET, SAME_F64, assert_close
from torch import Tensor
from torch.autograd.functional import jvp

from tarflow_fast.errors import ArgumentError
from tarflow_fast.flows import build
from tarflow_fast.flows.manifolds import Manifold, Sphere, Torus
from tarflow_fast.flows.ode import ODE

GENERATOR = 3
SPHERE, TORUS = (case for case in CASES if case.name == "riemannian")
MANIFOLDS = [Sphere(2), Sphere(3), Sphere(5), Torus(1), Torus(3)]
manifolds = pytest.mark.parametrize("manifold", MANIFOLDS, ids=["circle", "sphere", "sphere5", "ring", "torus3"])
like = torch.empty(0, dtype=torch.float64)


def points(manifold: Manifold, n: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Returns pairs of points, (n, values), and times, (n,)."""
    generator = torch.Generator().manual_seed(GENERATOR)
    t = torch.rand(n, generator=generator, dtype=torch.float64)
    return manifold.uniform(n, generator, like), manifold.uniform(n, generator, like), t


def apart(manifold: Manifold, a: Tensor, b: Tensor) -> Tensor:
    """Returns the Euclidean distance of what a network sees of two points, which is 0 for equal points alone."""
    return (manifold.encode(a) - manifold.encode(b)).norm(dim=1)


@manifolds
def test_a_geodesic_joins_its_ends_at_constant_speed(manifold: Manifold) -> None:
    a, b, t = points(manifold)
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    assert_close(apart(manifold, manifold.geodesic(a, b, zero)[0], a), zero, SAME_F64)
    assert_close(apart(manifold, manifold.geodesic(a, b, one)[0], b), zero, SAME_F64)
    speeds = [manifold.geodesic(a, b, at)[1].norm(dim=1) for at in (zero, t, one)]
    assert_close(speeds[0], speeds[1], SAME_F64)
    assert_close(speeds[0], speeds[2], SAME_F64)
    assert speeds[0].max() <= math.pi * math.sqrt(manifold.values)


@manifolds
def test_the_speed_is_the_derivative_of_the_point_and_tangent(manifold: Manifold) -> None:
    a, b, t = points(manifold)
    seen, slope = jvp(lambda t: manifold.encode(manifold.geodesic(a, b, t)[0]), t, torch.ones_like(t))
    x, speed = manifold.geodesic(a, b, t)
    _, wanted = jvp(manifold.encode, x, speed)
    assert_close(slope, wanted, SAME_F64)
    assert_close(manifold.tangent(x, speed), speed, SAME_F64)
    assert_close(seen, manifold.encode(x), SAME_F64)


def test_points_that_are_close_or_opposite_have_finite_geodesics() -> None:
    a = torch.tensor([[1.0, 0, 0]], dtype=torch.float64)
    near = Sphere(3).project(a + torch.tensor([[0, 1e-9, 0]]))
    for b in (a, near, -a):
        x, speed = Sphere(3).geodesic(a, b, torch.tensor([0.25], dtype=torch.float64))
        assert torch.isfinite(x).all()
        assert torch.isfinite(speed).all()
    assert_close(Sphere(3).geodesic(a, near, torch.ones(1).double())[1][0, 1], torch.tensor(1e-9), 1e-15)


@pytest.mark.parametrize(("values", "area"), [(2, 2 * math.pi), (3, 4 * math.pi), (4, 2 * math.pi**2)])
def test_the_volume_of_a_sphere(values: int, area: float) -> None:
    assert math.exp(Sphere(values).log_volume) == pytest.approx(area)


@torch.no_grad()
def test_the_density_integrates_to_one_over_the_sphere() -> None:
    model = SPHERE.model(dtype=torch.float64)
    n = 48
    # cells of equal area: heights and longitudes at even distances
    height = (torch.arange(n, dtype=torch.float64) + 0.5) / n * 2 - 1
    angle = torch.arange(2 * n, dtype=torch.float64) / (2 * n) * 2 * math.pi
    h, a = torch.cartesian_prod(height, angle).unbind(1)
    flat = (1 - h.square()).sqrt()
    x = torch.stack([flat * a.cos(), flat * a.sin(), h], dim=1)
    density = model.log_prob(x, torch.ones(len(x), dtype=torch.int64)).exp()
    assert density.std() > 0.01 * density.mean()
    assert abs(float(density.mean()) * 4 * math.pi - 1) < FAMILY_INTEGRAL


@torch.no_grad()
def test_the_density_integrates_to_one_over_the_torus() -> None:
    model = TORUS.model(dtype=torch.float64)
    side = torch.arange(40, dtype=torch.float64) / 40 * 2 * math.pi
    density = model.log_prob(torch.cartesian_prod(side, side)).exp()
    assert density.std() > 0.01 * density.mean()
    assert abs(float(density.mean()) * (2 * math.pi) ** 2 - 1) < FAMILY_INTEGRAL


def tangents(x: Tensor) -> Tensor:
    """Returns an orthonormal basis of the tangent space of the sphere at x, (3,), as columns (3, 2)."""
    return torch.linalg.svd(x[None])[2][1:].T


def test_the_log_det_is_that_of_the_map_between_tangent_spaces() -> None:
    model, y = SPHERE.model(dtype=torch.float64), torch.tensor([1])
    model.ode = ODE("rk4", 32)
    for x in SPHERE.data(3).double().split(1):
        z, log_det = model(x, y)
        jacobian = torch.autograd.functional.jacobian(lambda x: model(x, y)[0][0], x)
        assert isinstance(jacobian, Tensor)
        between = tangents(z[0].detach()).T @ jacobian[:, 0] @ tangents(x[0])
        assert_close(log_det[0], between.det().abs().log(), FAMILY_LOG_DET)


@pytest.mark.parametrize("case", [SPHERE, TORUS], ids=["sphere", "torus"])
def test_samples_lie_on_the_manifold(case: FamilyCase) -> None:
    model = case.model()
    x = model.sample(200, generator=torch.Generator().manual_seed(1))
    assert torch.isfinite(model.check_data(x)).all()
    if case is SPHERE:
        assert_close(x.norm(dim=1), torch.ones(200), 1e-6)
    else:
        assert x.min() >= 0
        assert x.max() <= 2 * math.pi


@pytest.mark.parametrize("call", ["loss", "log_prob", "inverse"])
def test_points_off_the_manifold_are_refused(call: str) -> None:
    name = "z" if call == "inverse" else "x"
    off = torch.tensor([[1.0, 0, 0], [0, 1.1, 0]])
    with pytest.raises(ArgumentError, match=f"^{name}: expected points on the unit sphere, .*, got .* 0.1 off"):
        getattr(SPHERE.model(), call)(off)
    with pytest.raises(ArgumentError, match=rf"^{name}: expected angles in radians in \[0, 2π\], got values from -0.5"):
        getattr(TORUS.model(), call)(torch.tensor([[-0.5, 1.0]]))


def test_a_sphere_needs_two_dimensions() -> None:
    with pytest.raises(ArgumentError, match=r"^data_shape: "):
        build("riemannian", data_shape=(1,), manifold="sphere")
