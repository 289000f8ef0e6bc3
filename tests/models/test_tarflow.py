"""TarFlow, the differentiable density pass: against the published outputs, the reference and the laws."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import GOLDEN, Case, random_images, random_latents, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import BATCH, LOG_DET_F64, SAME_F64, assert_close, error_budget, max_error
from tolerances import GOLDEN as GOLDEN_TOLERANCE
from torch import Tensor

from tarflow_fast import reference
from tarflow_fast.errors import ArgumentError
from tarflow_fast.models import dequantize
from tarflow_fast.models.tarflow import TarFlow

STORED = [case for case in GOLDEN if case.weights_seed is None]
BATCH_SIZE = 3

golden = pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case.name)

SIZES: list[dict[str, Any]] = [
    {},
    {"nvp": False, "num_classes": 2},
    {"in_channels": 3, "img_size": 9, "patch_size": 3, "channels": 48, "head_dim": 16, "num_classes": 3},
    {"img_size": 5, "patch_size": 1, "num_blocks": 3, "layers_per_block": 2, "channels": 24, "head_dim": 24},
    {"img_size": 4, "patch_size": 4, "num_blocks": 1, "num_classes": 1},
    {"in_channels": 2, "img_size": 2, "patch_size": 1, "channels": 40, "head_dim": 8, "layers_per_block": 3},
]
"""Even and odd numbers of blocks and tokens, one token, heads of other sizes than 64, one class."""

every_size = pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "-".join(sizes) or "small")


def labels_for(model: TarFlow, batch: int) -> Tensor | None:
    """The last row without a class, the others with different ones where there are enough."""
    classes = model.config.num_classes
    return torch.tensor([*(i % classes for i in range(batch - 1)), -1]) if classes else None


def reference_density(model: TarFlow, images: Tensor, y: Tensor | None) -> reference.Density:
    tokens = reference.patchify(images, model.patch_size)
    return reference.density(model.state_dict(), tokens, y, head_dim=model.config.head_dim)


def reference_log_prob(model: TarFlow, images: Tensor, y: Tensor | None) -> Tensor:
    tokens = reference.patchify(images, model.patch_size)
    return reference.log_prob(model.state_dict(), tokens, y, head_dim=model.config.head_dim)


@golden
class TestGolden:
    def test_forward(self, case: Case) -> None:
        model, x = case.model(), case.tensor("in.image")
        z, outputs, log_det = model(x, case.y)
        assert_close(z, case.tensor("out.forward_z"), GOLDEN_TOLERANCE)
        assert_close(torch.stack(outputs), case.tensor("out.forward_outputs"), GOLDEN_TOLERANCE)
        assert_close(log_det, case.tensor("out.forward_logdet").expand(len(x)), GOLDEN_TOLERANCE)

    def test_dropped_and_no_labels(self, case: Case) -> None:
        if case.y is None:
            assert not case.has("out.forward_nolabel_z")
            return
        model, x = case.model(), case.tensor("in.image")
        for key, y in (("dropped", case.tensor("in.y_dropped")), ("nolabel", None)):
            z, _, log_det = model(x, y)
            assert_close(z, case.tensor(f"out.forward_{key}_z"), GOLDEN_TOLERANCE)
            assert_close(log_det, case.tensor(f"out.forward_{key}_logdet"), GOLDEN_TOLERANCE)

    def test_loss_gradient_and_denoised(self, case: Case) -> None:
        model, x = case.model(), case.tensor("out.reverse_unguided").requires_grad_()
        z, _, log_det = model(x, case.y)
        loss = model.get_loss(z, log_det)
        (gradient,) = torch.autograd.grad(loss, x)
        score = -x.numel() * gradient  # the loss is a mean over all values of the batch
        wanted = case.tensor("out.grad_at_unguided")
        assert_close(loss.reshape(1), case.tensor("out.loss_at_unguided"), GOLDEN_TOLERANCE)
        assert_close(score, -x.numel() * wanted, GOLDEN_TOLERANCE)
        denoised = x + case.noise_std**2 * score
        assert_close(denoised, case.tensor("out.denoised_unguided"), GOLDEN_TOLERANCE)


@pytest.mark.parametrize("case", STORED, ids=lambda case: case.name)
def test_state_dict_is_the_published_one(case: Case) -> None:
    """Same keys, none missing and none too many, with the same shapes and dtypes."""
    own = TarFlow(**case.constructor).state_dict()
    assert {name: (v.shape, v.dtype) for name, v in own.items()} == {
        name: (v.shape, v.dtype) for name, v in case.weights.items()
    }
    model = TarFlow(**case.constructor)
    model.load_state_dict(case.weights, strict=True)
    assert all(torch.equal(value, case.weights[name]) for name, value in model.state_dict().items())


def test_a_new_model_starts_as_published() -> None:
    """proj_out's weights start at zero: each block is an affine map that looks at no token."""
    model = TarFlow(3, 8, 2, 64, 2, 1, num_classes=2)
    for block in model.blocks:
        assert not block.proj_out.weight.any()
        assert block.proj_out.bias.any()
        assert torch.equal(block.attn_mask, torch.ones(16, 16).tril())
    assert torch.equal(model.var, torch.ones(16, 12))


@every_size
class TestAgainstReference:
    def test_density(self, sizes: dict[str, Any]) -> None:
        model = random_model(1, torch.float64, **sizes)
        x, y = random_images(model, BATCH_SIZE), labels_for(model, BATCH_SIZE)
        z, outputs, log_det = model(x, y)
        wanted = reference_density(model, x, y)
        assert_close(z, wanted.z, SAME_F64)
        assert_close(torch.stack(outputs), torch.stack(wanted.outputs), SAME_F64)
        assert_close(log_det, wanted.log_det / x[0].numel(), SAME_F64)
        assert_close(model.log_prob(x, y), reference_log_prob(model, x, y), SAME_F64)

    def test_fp32(self, sizes: dict[str, Any]) -> None:
        model = random_model(1, **sizes)
        x, y = random_images(model, BATCH_SIZE), labels_for(model, BATCH_SIZE)
        z, _, log_det = model(x, y)
        wanted = reference_density(copy.deepcopy(model).double(), x.double(), y)
        assert z.dtype == log_det.dtype == torch.float32
        assert_close(z, wanted.z, GOLDEN_TOLERANCE)
        assert_close(log_det, wanted.log_det / x[0].numel(), GOLDEN_TOLERANCE)

    def test_log_det_by_token(self, sizes: dict[str, Any]) -> None:
        model = random_model(1, torch.float64, **sizes)
        images, y = random_images(model, BATCH_SIZE), labels_for(model, BATCH_SIZE)
        wanted = reference_density(model, images, y).token_log_det
        x = model.patchify(images)
        for block, token_log_det in zip(model.blocks, wanted, strict=True):
            z, log_det = block.transform(x, y)
            assert_close(log_det, token_log_det, SAME_F64)
            assert not log_det[:, 0].any()
            x, mean = block(x, y)
            assert torch.equal(x, z)
            assert_close(mean, token_log_det.sum(1) / images[0].numel(), SAME_F64)

    def test_gradient_of_every_parameter(self, sizes: dict[str, Any]) -> None:
        model = random_model(1, torch.float64, **sizes)
        images, y = random_images(model, BATCH_SIZE).requires_grad_(), labels_for(model, BATCH_SIZE)
        z, _, log_det = model(images, y)
        model.get_loss(z, log_det).backward()

        twin = {name: value.detach().requires_grad_() for name, value in model.named_parameters()}
        weights = model.state_dict() | twin
        x = reference.patchify(images.detach(), model.patch_size).requires_grad_()
        result = reference.density(weights, x, y, head_dim=model.config.head_dim)
        loss = 0.5 * (result.z**2).mean() - result.log_det.mean() / x[0].numel()
        wanted = torch.autograd.grad(loss, [x, *twin.values()], allow_unused=True, materialize_grads=True)

        assert images.grad is not None
        assert_close(reference.patchify(images.grad, model.patch_size), wanted[0], SAME_F64)
        for (name, parameter), gradient in zip(model.named_parameters(), wanted[1:], strict=True):
            assert parameter.grad is not None, name
            assert_close(parameter.grad, gradient, SAME_F64)
            # With one token nothing is transformed; the bias of the keys shifts all logits alike.
            assert gradient.any() or model.num_patches == 1, name


@pytest.mark.parametrize("nvp", [True, False])
def test_log_det_is_the_jacobians(nvp: bool) -> None:
    tiny = {"in_channels": 2, "img_size": 2, "patch_size": 1, "channels": 16, "head_dim": 8}
    model = random_model(2, torch.float64, **tiny, nvp=nvp, num_classes=2)
    x, y = random_images(model, 1), torch.tensor([1])
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x, y)[0], x).reshape(8, 8)
    log_det = model(x, y)[2][0] * 8
    assert_close(log_det, torch.linalg.slogdet(jacobian).logabsdet, LOG_DET_F64)
    assert (log_det.abs().item() > 1e-3) == nvp


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_half_precision(dtype: torch.dtype, how: str) -> None:
    """No further from float64 than twice the plain expression in that dtype, with z and log-det in fp32."""
    model = random_model(3, num_classes=2, num_blocks=3, layers_per_block=2)
    x, y = random_images(model, 4), torch.tensor([0, 1, -1, 1])
    exact = reference_density(copy.deepcopy(model).double(), x.double(), y)
    half = copy.deepcopy(model).to(dtype)
    plain = reference_density(half, x, y)
    if how == "autocast":
        with torch.autocast("cpu", dtype=dtype):
            z, _, log_det = model(x, y)
    else:
        z, _, log_det = half(x, y)
    assert z.dtype == log_det.dtype == torch.float32
    assert 1e-4 < max_error(z, exact.z) <= error_budget(plain.z, exact.z, dtype)
    nats = log_det * x[0].numel()
    assert max_error(nats, exact.log_det) <= error_budget(plain.log_det, exact.log_det, dtype)


def test_half_precision_gradients() -> None:
    model = random_model(3, num_classes=2)
    x, y = random_images(model, 4), torch.tensor([0, 1, -1, 1])

    def gradients(model: TarFlow) -> dict[str, Tensor]:
        model.zero_grad()
        z, _, log_det = model(x.to(model.dtype), y)
        model.get_loss(z, log_det).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    exact = gradients(copy.deepcopy(model).double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = gradients(model)
    assert half.keys() == exact.keys()
    for name, wanted in exact.items():
        assert half[name].dtype == torch.float32
        if not name.endswith("qkv.bias"):  # a third of it, the keys', is zero but for rounding
            error = (half[name] - wanted).norm() / wanted.norm()
            assert error < 2**-5, name


@settings(max_examples=15)
@given(
    channels=st.integers(1, 3),
    patch_size=st.integers(1, 4),
    grid=st.integers(1, 4),
    batch=st.integers(1, 3),
)
def test_patchify(channels: int, patch_size: int, grid: int, batch: int) -> None:
    model = TarFlow(channels, patch_size * grid, patch_size, 8, 1, 1, head_dim=8)
    images = random_images(model, batch)
    tokens = model.patchify(images)
    assert tokens.shape == (batch, grid**2, channels * patch_size**2)
    assert torch.equal(tokens, reference.patchify(images, patch_size))
    assert torch.equal(model.unpatchify(tokens), images)


def test_rows_are_independent() -> None:
    model = random_model(4, num_classes=3)
    x, y = random_images(model, 5), torch.tensor([0, 1, 2, -1, 1])
    z, _, log_det = model(x, y)
    for i in range(5):
        alone, _, log_det_alone = model(x[i : i + 1], y[i : i + 1])
        assert_close(alone[0], z[i], BATCH)
        assert_close(log_det_alone[0], log_det[i], BATCH)


@pytest.mark.parametrize("nvp", [True, False])
def test_forward_leaves_its_arguments_alone(nvp: bool) -> None:
    model = random_model(4, num_classes=3, nvp=nvp)
    x, y = random_images(model, 2), torch.tensor([-5, 1])
    before = x.clone(), y.clone(), {name: value.clone() for name, value in model.state_dict().items()}
    model(x, y)
    model.log_prob(x, y)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    assert all(torch.equal(value, before[2][name]) for name, value in model.state_dict().items())


class TestBitsPerDim:
    def test_by_hand(self) -> None:
        """Zero outputs make the flow the identity: p is N(0, 1) and its bits can be written down."""
        model = random_model(0, torch.float64)
        for block in model.blocks:
            torch.nn.init.zeros_(block.proj_out.weight)
            torch.nn.init.zeros_(block.proj_out.bias)
        x = random_images(model, 2)
        nats = 0.5 * x.square().flatten(1).mean(1) + 0.5 * math.log(2 * math.pi)
        assert_close(model.bits_per_dim(x), nats / math.log(2) + 7, SAME_F64)

    def test_is_log_prob_of_the_8_bit_scale(self) -> None:
        """The density of v + u = 128 (x + 1) is p(x) / 128^N."""
        model = random_model(0, torch.float64, nvp=False, num_classes=2)
        x, y = random_images(model, 2), torch.tensor([1, -1])
        log2_p = (reference_log_prob(model, x, y) - x[0].numel() * math.log(128)) / math.log(2)
        assert_close(model.bits_per_dim(x, y), -log2_p / x[0].numel(), SAME_F64)

    def test_a_uniform_guess_costs_eight_bits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """p(x) = ½ on [-1, 1) for each of 64 values: all 256 levels alike."""
        model = random_model(0)
        monkeypatch.setattr(model, "log_prob", lambda x, y: torch.full((len(x),), 64 * math.log(0.5)))
        assert_close(model.bits_per_dim(random_images(model, 2)), torch.tensor([8.0, 8.0]), 1e-5)


class TestDequantize:
    def test_range(self) -> None:
        v = torch.arange(256, dtype=torch.uint8).expand(400, 256)
        x = dequantize(v)
        assert x.dtype == torch.float32
        assert x.min() >= -1
        assert x.max() < 1
        assert torch.equal(((x + 1) * 128).floor(), v.float())
        u = (x + 1) * 128 - v
        assert abs(u.mean() - 0.5) < 0.01
        assert abs(u.var() - 1 / 12) < 0.01

    def test_the_top_of_a_bin_stays_in_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch, "randint", lambda high, shape, **_: torch.full(shape, high - 1))
        v = torch.arange(256, dtype=torch.uint8)
        assert torch.equal(((dequantize(v) + 1) * 128).floor(), v.float())

    def test_seeded(self) -> None:
        v = torch.zeros(3, 4, dtype=torch.uint8)
        a, b, c = (dequantize(v, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert torch.equal(a, b)
        assert not torch.equal(a, c)

    @pytest.mark.parametrize("images", [torch.zeros(2), torch.zeros(2, dtype=torch.int64), [0, 1]])
    def test_bad_images(self, images: object) -> None:
        with pytest.raises(ArgumentError, match="images: expected a uint8 tensor"):
            dequantize(images)  # type: ignore[arg-type]


class TestPrior:
    def test_moving_average(self) -> None:
        model = random_model(0, nvp=False)
        z, before = random_latents(model, 7), model.var.clone()
        model.update_prior(z.requires_grad_())
        assert_close(model.var, 0.9 * before + 0.1 * z.square().mean(0), 1e-6)
        assert not model.var.requires_grad

    def test_shifts_log_prob(self) -> None:
        model = random_model(0, torch.float64, nvp=False)
        x = random_images(model, 2)
        before = model.log_prob(x)
        model.update_prior(model(x)[0])
        assert_close(model.log_prob(x), reference_log_prob(model, x, None), SAME_F64)
        assert (model.log_prob(x) > before).all()

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_bad_latents(self, value: float) -> None:
        model = random_model(0, nvp=False)
        before = model.var.clone()
        with pytest.raises(ArgumentError, match="z: expected finite"):
            model.update_prior(torch.full((2, 16, 4), value))
        with pytest.raises(ArgumentError, match=r"z: expected shape \(B, 16, 4\)"):
            model.update_prior(torch.ones(2, 16, 1))
        assert torch.equal(model.var, before)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "conditional"), [("inductor", False), ("aot_eager", True)])
def test_compiled(backend: str, conditional: bool) -> None:
    """torch.compile, forward and backward, gives what eager gives; one graph but for the check of labels."""
    model = random_model(6, num_classes=2 if conditional else 0)
    x, y = random_images(model, 2), torch.tensor([-1, 1]) if conditional else None
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=not conditional)

    def run(f: Callable[..., tuple[Tensor, list[Tensor], Tensor]]) -> list[Tensor]:
        model.zero_grad()
        z, _, log_det = f(x, y)
        model.get_loss(z, log_det).backward()
        return [z, log_det, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    for got, wanted in zip(run(compiled), run(model), strict=True):
        assert_close(got, wanted, GOLDEN_TOLERANCE)
