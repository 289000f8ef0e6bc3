"""Where the density pass is PyTorch's: what the C++ pass cannot do and who is refused it, and how denoising chooses."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from cases import random_images, random_model
from tolerances import SAME_F32, assert_close
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tarflow_fast.errors import ArgumentError, BackendError
from tarflow_fast.models import cpu_density as module
from tarflow_fast.models.cpu_density import cpu_density_missing
from tarflow_fast.models.denoising import denoise
from tarflow_fast.models.tarflow import TarFlow
from tarflow_fast.native import load_native

try:
    load_native()
except BackendError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned_density")


def _with_hook(model: TarFlow) -> None:
    model.blocks[1].attn_blocks[0].mlp.register_forward_hook(lambda *_: None)


def _with_other_linear(model: TarFlow) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    size = model.config.channels
    model.blocks[0].attn_blocks[0].attention.proj = Doubled(size, size)


def _with_parametrisation(model: TarFlow) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.blocks[0].proj_in)


def _nothing(model: TarFlow) -> None:
    pass


def _doubles(model: TarFlow) -> None:
    model.double()


def _sdpa(model: TarFlow) -> None:
    model.set_attention("sdpa")


@pytest.mark.parametrize(
    ("change", "context", "reason"),
    [
        (_with_hook, torch.no_grad, "MLP has forward hooks"),
        (_with_other_linear, torch.no_grad, "what a Doubled computes"),
        (_with_parametrisation, torch.no_grad, "what a ParametrizedLinear computes"),
        (_doubles, torch.no_grad, "float32 and bfloat16 only"),
        (_sdpa, torch.no_grad, "attention='sdpa'"),
        (_nothing, nullcontext, "autograd is to record"),
        (_nothing, lambda: FlopCounterMode(display=False), "autograd|mode of torch"),
    ],
)
def test_torch_serves_what_it_cannot(
    change: Callable[[TarFlow], None], context: Callable[[], AbstractContextManager[Any]], reason: str
) -> None:
    """By default the result is PyTorch's; where the C++ pass was asked for, the error says why it cannot be had."""
    model = random_model()
    change(model)
    images = random_images(model, 2)
    with torch.no_grad():
        wanted = model.set_density("torch")(images)
    with context():
        found = model.set_density("auto")(images)
        assert torch.equal(found[0].detach(), wanted[0])
        assert torch.equal(found[2].detach(), wanted[2])
        with pytest.raises(BackendError, match=f"density 'cpu' cannot be had: .*({reason})"):
            model.set_density("cpu")(images)


def test_counting_modes_see_torchs_operations() -> None:
    model = random_model()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(random_images(model, 2))
    assert counter.get_total_flops() > 0


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # vmap's own attention
def test_transforms_of_torch_func_go_through_torch() -> None:
    model = random_model()
    images = random_images(model, 3)
    with torch.no_grad():
        wanted = model.set_density("torch").log_prob(images)
        model.set_density("auto")
        each = torch.func.vmap(lambda image: model(image[None])[0][0])(images)
        assert_close(each, model(images)[0], SAME_F32)
    score = torch.func.grad(lambda x: model(x)[2].sum())(images)
    assert score.abs().max() > 0
    assert_close(model.log_prob(images).detach(), wanted, SAME_F32 * 100)


def test_frozen_models_record_gradients_of_images() -> None:
    model = random_model().requires_grad_(False)
    images = random_images(model, 2).requires_grad_()
    model.log_prob(images).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().max() > 0


def test_without_the_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise BackendError("the native CPU engine was not built; install a C++17 compiler")

    monkeypatch.setattr(module, "load_native", absent)
    model = random_model()
    images = random_images(model, 2)
    assert "not built" in str(cpu_density_missing(model.blocks, images, torch.float32, gradients=False))
    assert denoise(model, images, noise_std=0.1).isfinite().all()
    with pytest.raises(BackendError, match=r"backend 'cpu' cannot be had: .*install a C\+\+17 compiler"):
        denoise(model, images, noise_std=0.1, backend="cpu")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backend": "triton"}, ArgumentError, "backend"),
        ({"backend": "cpu", "dtype": torch.float16}, BackendError, "float32 and bfloat16"),
        ({"backend": "torch", "threads": 2}, BackendError, "threads"),
        ({"threads": 0}, ArgumentError, "threads"),
        ({"batch_size": 0}, ArgumentError, "batch_size"),
        ({"dtype": "bf16"}, ArgumentError, "dtype"),
        ({"dtype": torch.int8}, ArgumentError, "dtype"),
    ],
)
def test_denoise_refuses(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = random_model()
    with pytest.raises(error, match=message):
        denoise(model, random_images(model, 2), noise_std=0.1, **options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("gpu",), ArgumentError, "density"),
        (("cpu", 0), ArgumentError, "threads"),
        (("torch", 2), BackendError, "threads"),
    ],
)
def test_set_density_refuses(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    model = random_model()
    with pytest.raises(error, match=message):
        model.set_density(*arguments)


def test_denoise_takes_its_own_backend_whatever_the_models_is() -> None:
    model, images = random_model(), random_images(random_model(), 3)
    wanted = denoise(model, images, noise_std=0.1, backend="torch")
    model.set_density("cpu", 1)
    assert torch.equal(denoise(model, images, noise_std=0.1, backend="torch"), wanted)
    with torch.no_grad():
        model.log_prob(images)
    assert (model._density, model._density_threads) == ("cpu", 1)
