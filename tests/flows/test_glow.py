"""Glow: its linear map of channels, its scales, and its first batch."""

from __future__ import annotations

import pytest
import torch
from tolerances import SAME_F32, SAME_F64, assert_close
from torch import Tensor

from tarflow_fast.errors import ArgumentError
from tarflow_fast.flows import build
from tarflow_fast.flows.actnorm import ActNorm
from tarflow_fast.flows.composition import Squeeze
from tarflow_fast.flows.coupling import Coupling
from tarflow_fast.flows.glow import Convolution


def convolution(*shape: int, stir: float = 0.2) -> Convolution:
    torch.manual_seed(0)
    step = Convolution(shape).double()
    with torch.no_grad():
        for parameter in step.parameters():
            parameter += stir * torch.randn(parameter.shape, dtype=torch.float64)
    return step


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def matrix_of(step: Convolution) -> Tensor:
    """Returns W, whose columns are the images of unit vectors."""
    channels = len(step.sign)
    eye = torch.eye(channels, dtype=torch.float64).reshape(channels, channels, *([1, 1] if step.pixels > 1 else []))
    found: Tensor = step(eye)[0]
    return found.reshape(channels, channels).T


@pytest.mark.parametrize("shape", [(6,), (6, 3, 5)], ids=str)
def test_the_log_det_is_that_of_the_matrix_at_every_pixel(shape: tuple[int, ...]) -> None:
    step = convolution(*shape)
    W, x = matrix_of(step), noise(4, *shape)
    z, log_det = step(x)
    assert_close(z, torch.einsum("ij,bj...->bi...", W, x), SAME_F64)
    pixels = int(torch.Size(shape[1:]).numel())
    assert_close(log_det, (pixels * torch.linalg.slogdet(W)[1]).expand(4), SAME_F64)
    back, inverse_log_det = step.inverse(z)
    assert_close(back, x, SAME_F64)
    assert_close(inverse_log_det, -log_det, SAME_F64)


def test_the_map_begins_as_a_rotation() -> None:
    W = matrix_of(convolution(8, stir=0.0))
    assert_close(W @ W.T, torch.eye(8, dtype=torch.float64), SAME_F32)  # its factors are made in fp32
    assert (W.abs() > 1e-6).all()


def test_only_triangles_are_learnt() -> None:
    """What an optimizer writes beyond the triangles changes nothing."""
    step = convolution(5)
    W = matrix_of(step)
    with torch.no_grad():
        step.lower += torch.ones(5, 5).triu()
        step.upper += torch.ones(5, 5).tril()
    assert torch.equal(matrix_of(step), W)


def test_an_image_of_28_pixels_has_three_scales() -> None:
    model = build("glow", data_shape=(1, 28, 28), depth=2, width=4)
    shapes = [module.shift.shape[0] for module in model.modules() if isinstance(module, ActNorm)]
    assert shapes == [4, 4, 8, 8, 4, 4]  # 14×14 pixels, then 7×7, and the last scale has no square to take
    assert sum(isinstance(module, Squeeze) for module in model.modules()) == 2
    assert sum(isinstance(module, Coupling) for module in model.modules()) == 6
    with torch.no_grad():
        x = torch.randn(2, 1, 28, 28)
        z = model(x)[0]
        assert z.shape == x.shape
        assert_close(model.inverse(z)[0], x, SAME_F32)
    with pytest.raises(ArgumentError, match=r"^scales: expected at most 3"):
        build("glow", data_shape=(1, 28, 28), scales=4)


def test_the_last_scale_takes_squares_where_sides_are_even() -> None:
    model = build("glow", data_shape=(3, 8, 8), depth=1, width=4)
    assert sum(isinstance(module, Squeeze) for module in model.modules()) == 3


@pytest.mark.parametrize(("shape", "sizes"), [((3,), {"steps": 1}), ((1, 4, 4), {"depth": 1, "scales": 1})], ids=str)
def test_the_first_batch_sets_the_scale(shape: tuple[int, ...], sizes: dict[str, int]) -> None:
    """A new model's latents of its first batch have mean 0 and variance 1 in every channel, as couplings do nothing."""
    torch.manual_seed(0)
    model = build("glow", data_shape=shape, **sizes).train()
    x = 5 + 3 * torch.randn(512, *shape)
    steps = [module for module in model.modules() if isinstance(module, ActNorm)]
    outputs: list[Tensor] = []
    steps[0].register_forward_hook(lambda module, given, out: outputs.append(out[0]))
    model.loss(x)
    axes = [axis for axis in range(outputs[0].dim()) if axis != 1]
    assert_close(outputs[0].mean(axes), torch.zeros(outputs[0].shape[1]), 1e-4)
    assert_close(outputs[0].std(axes, correction=0), torch.ones(outputs[0].shape[1]), 1e-4)
    before = steps[0].shift.clone()
    model.loss(x + 1)
    assert torch.equal(steps[0].shift, before)


@pytest.mark.parametrize("wrong", ["steps", "scales", "depth", "width"])
def test_sizes_of_nothing_are_refused(wrong: str) -> None:
    with pytest.raises(ArgumentError, match=rf"^{wrong}: expected an integer >= 1"):
        build("glow", data_shape=(1, 8, 8), **{wrong: 0})
