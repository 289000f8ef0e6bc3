"""The networks of velocities: they begin as the identity, know time and class, and refuse what they cannot halve."""

from __future__ import annotations

import pytest
import torch
from tolerances import SAME_F32, assert_close

from tarflow_fast.errors import ArgumentError
from tarflow_fast.flows import build
from tarflow_fast.flows.velocity import ImageVelocity, VectorVelocity


@pytest.mark.parametrize(
    ("network", "shape"),
    [(VectorVelocity(3, 3, 2, 8, 1, octaves=2), (3,)), (ImageVelocity((2, 8, 4), 2, 4, 1), (2, 8, 4))],
    ids=["vectors", "images"],
)
def test_a_velocity_depends_on_place_time_and_class(network: torch.nn.Module, shape: tuple[int, ...]) -> None:
    x, t, context = torch.randn(4, *shape), torch.full((), 0.3), torch.eye(2).repeat(2, 1)
    assert_close(network(x, t, context), torch.zeros_like(x), 0)
    with torch.no_grad():
        for weight in network.parameters():
            weight += 0.3 * torch.randn(weight.shape)
    v = network(x, t, context)
    assert v.shape == x.shape
    assert_close(network(x, t.expand(4), context), v, SAME_F32)
    assert_close(network(x[1:2], t, context[1:2]), v[1:2], SAME_F32)
    for other in (network(x, t + 0.5, context), network(x, t, context.flip(1)), network(x + 1, t, context)):
        assert (other - v).abs().amax() > 1e-3


@pytest.mark.parametrize("octaves", [0, 2])
@torch.no_grad()
def test_a_network_sees_octaves_beside_the_vectors(octaves: int) -> None:
    network = VectorVelocity(3, 3, 0, 8, 1, octaves)
    for weight in network.parameters():
        weight += torch.randn(weight.shape)
    network.enter.weight[:, :3] = 0  # of the vectors themselves
    x, t = torch.randn(4, 3), torch.full((), 0.3)
    assert torch.equal(network(x, t), network(x + 1, t)) == (octaves == 0)


def test_images_that_cannot_be_halved_twice_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"^data_shape: expected images whose height and width are multiples of 4"):
        build("flow-matching", data_shape=(1, 6, 8))
