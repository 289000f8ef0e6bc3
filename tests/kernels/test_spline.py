"""The spline's kernels against PyTorch: images, log-derivatives, gradients, both ways."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import KERNEL_DEVICE
from splines import LAWS, NO_LEAST_SIZE, random_splines
from tolerances import SAME_F32, SAME_F64, assert_close
from torch import Tensor

from tarflow_fast import spline as torch_spline
from tarflow_fast.errors import ArgumentError
from tarflow_fast.fused.function import Fused
from tarflow_fast.fused.spline import _Spline
from tarflow_fast.kernels import spline as kernel
from tarflow_fast.spline import SplineLaw

LAW = LAWS["nflows"]
every_law = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
both_ways = pytest.mark.parametrize("inverse", [False, True])


def problem(law: SplineLaw, spread: float, dtype: torch.dtype, n: int = 37) -> tuple[Tensor, Tensor]:
    parameters, value = random_splines(law, n, spread, seed=2, dtype=dtype)
    return parameters.to(KERNEL_DEVICE), value.to(KERNEL_DEVICE)


def through_triton(
    parameters: Tensor, value: Tensor, law: SplineLaw, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns what `fused_spline` does where Triton serves."""
    flat = parameters.reshape(-1, parameters.shape[-1]), value.reshape(-1)
    image, log_derivative = Fused.apply(_Spline(law, inverse), "triton", *flat)
    return image.view(value.shape), log_derivative.view(value.shape)


@both_ways
@every_law
@pytest.mark.parametrize("spread", [1, 1000])
def test_forward(law: SplineLaw, inverse: bool, spread: float) -> None:
    """In fp64 it is the same, and in fp32 it is that rounded, for more values than one program takes."""
    for dtype, n, tolerance in ((torch.float64, 37, SAME_F64), (torch.float32, 600, SAME_F32)):
        parameters, value = problem(law, spread, dtype, n)
        got = through_triton(parameters, value, law, inverse=inverse)
        wanted = torch_spline.spline(parameters.double(), value.double(), law, inverse=inverse)
        assert got[0].dtype == got[1].dtype == dtype
        assert_close(got[0], wanted[0], tolerance)
        assert_close(got[1], wanted[1], max(tolerance, 1e-8))


@both_ways
@every_law
def test_gradients(law: SplineLaw, inverse: bool) -> None:
    """Those of either result alone and of both, for values inside, at the ends and outside."""
    parameters, value = (of.requires_grad_() for of in problem(law, 1.0, torch.float64))
    generator = torch.Generator().manual_seed(3)
    upstream = torch.randn(2, len(value), generator=generator, dtype=torch.float64).to(KERNEL_DEVICE)
    for weights in ((1, 0), (0, 1), (1, 1)):
        gradients = []
        for spline in (through_triton, torch_spline.spline):
            results = spline(parameters, value, law, inverse=inverse)
            loss = sum(w * (of * g).sum() for w, of, g in zip(weights, results, upstream, strict=True))
            gradients.append(torch.autograd.grad(loss, (parameters, value)))
        inside = slice(2, None)  # at an end, the gradient of one side is as good as that of the other
        for got, wanted in zip(*gradients, strict=True):
            assert_close(got[inside], wanted[inside], 1e-9)
            assert got.isfinite().all()


def test_everything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that comes uninitialised holds NaN here, and none is left."""
    poison = lambda of, **_: torch.full(of.shape, torch.nan, dtype=of.dtype, device=of.device)  # noqa: E731
    monkeypatch.setattr(torch, "empty_like", poison)
    parameters, value = problem(LAW, 1.0, torch.float32, 70)
    image, log_derivative = kernel.spline_forward(parameters, value, LAW)
    gradients = kernel.spline_backward(image, image, parameters, value, image, LAW, False)
    assert all(of.isfinite().all() for of in (image, log_derivative, *gradients))


@both_ways
def test_values_without_an_image(inverse: bool) -> None:
    """A NaN stays one, a value outside stays itself, and without tails it becomes NaN and has no gradient."""
    for law in (LAW, LAWS["nflows, no tails"]):
        parameters, _ = (of.requires_grad_() for of in problem(law, 1.0, torch.float32, 4))
        value = torch.tensor([torch.nan, 7.0, -torch.inf, 1e30], device=KERNEL_DEVICE)
        image, log_derivative = through_triton(parameters, value, law, inverse=inverse)
        wanted = torch_spline.spline(parameters, value, law, inverse=inverse)
        assert torch.equal(image.nan_to_num(99), wanted[0].nan_to_num(99))
        assert torch.equal(log_derivative.nan_to_num(99), wanted[1].nan_to_num(99))
        (gradient,) = torch.autograd.grad(image[1:].sum(), parameters)
        assert torch.equal(gradient[1:], torch.zeros_like(gradient[1:]))


@both_ways
def test_bins_without_size_do_no_harm(inverse: bool) -> None:
    parameters, value = problem(NO_LEAST_SIZE, 1000, torch.float64)
    value = value.clamp(-2, 2)
    got = through_triton(parameters, value, NO_LEAST_SIZE, inverse=inverse)
    assert got[0].abs().max() <= 2 + 1e-14
    assert got[1].isfinite().all()


def test_the_end_comes_back() -> None:
    """The image of the interval's end is not beyond it, however its terms are rounded."""
    law = replace(LAWS["nflows, no tails"], low=-0.1, high=0.3)
    parameters, _ = problem(law, 10.0, torch.float64, 400)
    image, _ = through_triton(parameters, torch.full((400,), law.high, dtype=torch.float64, device=KERNEL_DEVICE), law)
    assert (image <= law.high).all()
    assert through_triton(parameters, image, law, inverse=True)[0].isfinite().all()


def test_shapes() -> None:
    for shape in [(), (0,), (2, 3)]:
        parameters = torch.zeros(*shape, LAW.parameters, device=KERNEL_DEVICE)
        for of in through_triton(parameters, torch.zeros(shape, device=KERNEL_DEVICE), LAW):
            assert of.shape == shape


def test_refusals() -> None:
    parameters, value = problem(LAW, 1.0, torch.float32, 4)
    with pytest.raises(ArgumentError, match=r"parameters: .*\(4, 29\)"):
        kernel.spline_forward(parameters[:, 1:], value, LAW)
    with pytest.raises(ArgumentError, match=r"parameters: .*float32"):
        kernel.spline_forward(parameters.double(), value, LAW)
    with pytest.raises(ArgumentError, match="value: "):
        kernel.spline_forward(parameters.bfloat16(), value.bfloat16(), LAW)
    with pytest.raises(ArgumentError, match="image: "):
        kernel.spline_backward(value, value, parameters, value, value[1:], LAW, True)
