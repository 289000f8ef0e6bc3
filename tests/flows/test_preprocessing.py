"""Preprocessing changes variables: densities stay densities, and 8-bit images get a bound of their probability."""

from __future__ import annotations

import math

import pytest
import torch
from tolerances import FAMILY_INTEGRAL, FAMILY_LOG_DET, STANDARD_ERRORS, assert_close
from torch import Tensor

from tarflow_fast.errors import ArgumentError
from tarflow_fast.flows import FamilyFlow, Preprocessed, build
from tarflow_fast.flows.preprocessing import LEVELS, Logit, Standardise, VariationalNoise

SHAPE = (1, 2, 1)  # an image of two pixels, of which all 256² values can be summed over


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stirred(model: FamilyFlow, by: float = 0.1) -> FamilyFlow:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by * torch.randn(parameter.shape, generator=seeded(1))
    return model.eval()


def pixels(dequantization: str) -> Preprocessed:
    """Returns a model of images of two pixels."""
    torch.manual_seed(0)
    flow = build("nice", data_shape=SHAPE, couplings=3, hidden=(8,))
    model = stirred(Preprocessed(flow, Preprocessed.Options(dequantization)).double())  # type: ignore[arg-type]
    assert isinstance(model, Preprocessed)
    return model


@pytest.mark.parametrize("step", [Logit(0.05), Standardise((3,))], ids=["logit", "standardise"])
def test_a_step_is_a_change_of_variables(step: Logit | Standardise) -> None:
    step = step.double()
    x = torch.rand(4, 3, generator=seeded(1), dtype=torch.float64) * LEVELS
    if isinstance(step, Standardise):
        step.fit(x)
    z, log_det = step(x)
    back, inverse_log_det = step.inverse(z)
    jacobians = [torch.autograd.functional.jacobian(lambda row: step(row)[0][0], row) for row in x.split(1)]
    wanted = torch.stack([torch.linalg.slogdet(j[:, 0])[1] for j in jacobians if isinstance(j, Tensor)])
    assert_close(log_det, wanted, FAMILY_LOG_DET)
    assert_close(inverse_log_det, -wanted, FAMILY_LOG_DET)
    assert_close(back, x, FAMILY_LOG_DET)


def test_standardised_data_have_mean_0_and_variance_1() -> None:
    x = 3 + 7 * torch.randn(1000, 2, generator=seeded(1))
    x[:, 1] = 5.0  # a column that never changes keeps its scale
    step = Standardise((2,))
    step.fit(x)
    z = step(x)[0]
    assert_close(z.mean(0), torch.zeros(2), 1e-5)
    assert_close(z.std(0, correction=0), torch.tensor([1.0, 0.0]), 1e-5)


@pytest.mark.parametrize("kind", ["uniform", pytest.param("variational", marks=pytest.mark.slow)])
def test_the_bound_of_all_images_sums_to_at_most_one(kind: str) -> None:
    """For uniform noise E_u[p(v + u)] sums to the mass of the box; exp(E_u[log p]) of a bound, to less."""
    model = pixels(kind)
    levels = torch.arange(LEVELS, dtype=torch.float64)
    v = torch.cartesian_prod(levels, levels).reshape(-1, *SHAPE)
    with torch.no_grad():
        draws = torch.stack([model.log_prob(v, generator=seeded(i)) for i in range(4)])
    unbiased = draws.exp().mean(0).sum()  # E_q[p(v + u) / q(u | v)] = P(v)
    bound = draws.mean(0).exp().sum()
    assert bound < unbiased
    assert float(unbiased) == pytest.approx(1, abs=5 * FAMILY_INTEGRAL)


def test_the_density_of_the_box_is_that_of_the_continuous_model() -> None:
    model = pixels("uniform")
    v = torch.randint(LEVELS, (4, *SHAPE), generator=seeded(1)).double()
    u = torch.rand(v.shape, generator=seeded(2), dtype=torch.float64)
    z, log_det = model(v + u)
    assert_close(model.log_prob(v, generator=seeded(2)), model.prior_log_prob(z) + log_det, FAMILY_LOG_DET)


def test_variational_noise_has_the_density_that_it_tells() -> None:
    """E_q[1 / q(u | v)] is the length of the unit interval, whatever v is, if q is a density on it."""
    torch.manual_seed(0)
    noise = VariationalNoise((1, 1, 1)).double()
    with torch.no_grad():
        noise.network.last.bias.copy_(torch.tensor([0.3, -0.2]))
        n = 100_000
        epsilon = torch.randn(n, 1, 1, 1, generator=seeded(1), dtype=torch.float64)
        u, log_q = noise(torch.full_like(epsilon, 7.0), epsilon)
    assert bool(((u > 0) & (u < 1)).all())
    inside = ((u > 0.1) & (u < 0.9)).flatten()
    values = torch.where(inside, (-log_q).exp(), 0.0)
    error = float(values.std()) / math.sqrt(n)
    assert abs(float(values.mean()) - 0.8) < STANDARD_ERRORS * error


def test_samples_are_levels() -> None:
    x = pixels("uniform").sample(500, generator=seeded(1))
    assert torch.equal(x, x.floor())
    assert 0 <= float(x.min()) < float(x.max()) <= LEVELS - 1


def test_bounded_data_need_a_logit() -> None:
    flow = build("nice", data_shape=SHAPE)
    with pytest.raises(ArgumentError, match=r"^logit: expected True, as 8-bit data are bounded and 'nice' has all"):
        Preprocessed(flow, Preprocessed.Options("uniform", logit=False))


@pytest.mark.parametrize("value", [-1.0, 255.5, 300.0])
def test_levels_out_of_range_are_refused(value: float) -> None:
    with pytest.raises(ArgumentError, match=r"^x: expected 8-bit levels, 0 to 255, got "):
        pixels("uniform").log_prob(torch.full((1, *SHAPE), value, dtype=torch.float64))


def test_bytes_are_taken_as_levels() -> None:
    model = pixels("uniform")
    v = torch.tensor([[[[0], [255]]]], dtype=torch.uint8)
    assert_close(model.log_prob(v, generator=seeded(1)), model.log_prob(v.double(), generator=seeded(1)), 0.0)


def test_alpha_is_checked() -> None:
    for alpha in (0.0, 0.3):
        with pytest.raises(ArgumentError, match=r"^alpha: "):
            Preprocessed.Options("uniform", alpha=alpha)
