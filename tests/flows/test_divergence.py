"""The divergence of a velocity: the trace of autograd's Jacobian, and estimates that are right on average."""

from __future__ import annotations

import math

import pytest
import torch
from tolerances import SAME_F64, STANDARD_ERRORS, assert_close
from torch import Tensor

from tarflow_fast.flows.divergence import draw_probe, with_divergence
from tarflow_fast.flows.velocity import ImageVelocity, VectorVelocity

PROBES = 4000


def stirred(network: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for weight in network.parameters():
            weight += 0.2 * torch.randn(weight.shape, dtype=weight.dtype)
    return network.double()


def trace(network: torch.nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """Returns the traces of autograd's Jacobians, sample by sample."""
    found = []
    for row in x.split(1):
        jacobian = torch.autograd.functional.jacobian(lambda r: network(r, t).flatten(), row)
        assert isinstance(jacobian, Tensor)
        found.append(jacobian.flatten(1).trace())
    return torch.stack(found)


@pytest.mark.parametrize(
    ("network", "shape"),
    [(VectorVelocity(3, 3, 0, 8, 1), (3,)), (ImageVelocity((1, 4, 8), 0, 4, 1), (1, 4, 8))],
    ids=["vectors", "images"],
)
def test_the_exact_divergence_is_the_trace_of_the_jacobian(network: torch.nn.Module, shape: tuple[int, ...]) -> None:
    x, t = torch.randn(2, *shape, dtype=torch.float64), torch.full((), 0.3, dtype=torch.float64)
    network = stirred(network)
    v, divergence = with_divergence(lambda at: network(at, t), x)
    assert_close(v, network(x, t), SAME_F64)
    assert_close(divergence, trace(network, x, t), SAME_F64)
    with torch.no_grad():
        v, without = with_divergence(lambda at: network(at, t), x)
    assert_close(without, divergence, SAME_F64)
    assert not v.requires_grad
    assert not without.requires_grad


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_an_estimate_is_the_trace_on_average(noise: str) -> None:
    network, t = stirred(VectorVelocity(4, 4, 0, 8, 1)), torch.full((), 0.7, dtype=torch.float64)
    x = torch.randn(1, 4, dtype=torch.float64)
    rows = x.expand(PROBES, 4)
    probe = draw_probe(rows, noise, torch.Generator().manual_seed(2))
    with torch.no_grad():
        _, estimates = with_divergence(lambda at: network(at, t), rows, probe)
    error = float(estimates.std()) / math.sqrt(PROBES)
    assert abs(float(estimates.mean() - trace(network, x, t)[0])) < STANDARD_ERRORS * error


def test_probes_have_mean_zero_and_covariance_one() -> None:
    like = torch.empty(PROBES, 3, dtype=torch.float64)
    signs = draw_probe(like, "rademacher", torch.Generator().manual_seed(1))
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    for probe in (signs, draw_probe(like, "gaussian", torch.Generator().manual_seed(1))):
        assert probe.shape == like.shape
        assert probe.dtype == like.dtype
        assert_close(probe.mean(0), torch.zeros(3), 4 / math.sqrt(PROBES))
        assert_close(probe.T @ probe / PROBES, torch.eye(3), 6 / math.sqrt(PROBES))


def test_a_divergence_can_be_differentiated() -> None:
    network, t = stirred(VectorVelocity(2, 2, 0, 6, 1)), torch.full((), 0.2, dtype=torch.float64)
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    for probe in (None, draw_probe(x, "rademacher")):
        assert torch.autograd.gradcheck(lambda x, p=probe: with_divergence(lambda at: network(at, t), x, p)[1], x)
