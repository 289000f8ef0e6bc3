"""Gradients of samples: those of autograd through the plain equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import random_latents, random_model
from tolerances import GOLDEN, assert_close
from torch import Tensor, nn

from tarflow_fast import ArgumentError, NonFiniteError, TarFlow, reference
from tarflow_fast.models.config import TarFlowConfig

GUIDED: dict[str, Any] = {"guidance": 1.5, "guide_what": "ab", "attn_temp": 0.7, "annealed_guidance": True}
RULES: list[dict[str, Any]] = [{}, GUIDED, {**GUIDED, "guide_what": "a"}, {**GUIDED, "guide_what": "b"}]
TINY: dict[str, Any] = {"img_size": 6, "channels": 16, "head_dim": 8, "num_blocks": 2}  # T = 9


def gradients(model: TarFlow, z: Tensor, y: Tensor | None, rule: dict[str, Any], ours: bool) -> list[Tensor]:
    """Of a loss of images and log-dets, with respect to z and every weight."""
    z = z.clone().requires_grad_()
    weights = dict(model.named_parameters())
    if ours:
        images, log_det = model.reverse(z, y, **rule, differentiable=True, return_log_det=True)
        tokens = reference.patchify(images, model.patch_size)
    else:
        found = reference.inverse({**model.state_dict(), **weights}, z, y, **rule, head_dim=model.config.head_dim)
        tokens, log_det = found.x, found.log_det
    loss = (tokens * torch.linspace(-1, 1, 4, dtype=tokens.dtype)).sin().sum() + 0.3 * log_det.square().sum()
    return list(torch.autograd.grad(loss, [z, *weights.values()], allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("nvp", [True, False])
def test_gradients_are_those_of_the_plain_equations(rule: dict[str, Any], nvp: bool) -> None:
    model = random_model(3, torch.float64, **TINY, num_classes=3, nvp=nvp)
    z, y = random_latents(model, 2), torch.tensor([1, -1])
    got, wanted = (gradients(model, z, y, rule, ours) for ours in (True, False))
    for a, b in zip(got, wanted, strict=True):
        assert_close(a / (1 + b.abs().max()), b / (1 + b.abs().max()), 1e-10)


def test_gradcheck() -> None:
    model = random_model(3, torch.float64, **{**TINY, "img_size": 4})
    z = random_latents(model, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: model.reverse(z, differentiable=True, return_log_det=True), (z,))


@pytest.mark.parametrize("sizes", [{}, {"num_classes": 3}], ids=str)
def test_in_fp32_it_is_the_same_pass(sizes: dict[str, Any]) -> None:
    model = random_model(**sizes)
    z, y = random_latents(model, 3), torch.tensor([0, 2, -1]) if sizes else None
    with torch.autocast("cpu", torch.bfloat16):
        images = model.reverse(z, y, differentiable=True)
    assert_close(images.detach(), model.reverse(z, y), GOLDEN)
    assert images.requires_grad
    got, wanted = (gradients(model, z, y, {}, ours) for ours in (True, False))
    for a, b in zip(got, wanted, strict=True):
        assert_close(a / (1 + b.abs().max()), b / (1 + b.abs().max()), 1e-3)
    sequence = model.reverse(z, y, differentiable=True, return_sequence=True)
    assert torch.equal(sequence[-1], images)
    assert_close(torch.stack(sequence).detach(), torch.stack(model.reverse(z, y, return_sequence=True)), GOLDEN)


def test_only_where_it_is_asked_for() -> None:
    model, z = random_model(), random_latents(random_model(), 2).requires_grad_()
    assert not model.reverse(z).requires_grad
    with torch.no_grad():
        assert not model.reverse(z, differentiable=True).requires_grad
    model.requires_grad_(False)
    assert model.reverse(z, differentiable=True).requires_grad
    assert not model.reverse(z.detach(), differentiable=True).requires_grad
    with pytest.raises(ArgumentError, match="differentiable"):
        model.reverse(z, differentiable="yes")
    with pytest.raises(TypeError, match="diferentiable"):
        model.reverse(z, diferentiable=True)


def test_a_step_through_samples_lowers_the_loss() -> None:
    model, z = random_model(num_classes=2), random_latents(random_model(), 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        loss = (model.reverse(z, 1, differentiable=True) - 0.5).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    images = model.reverse(z, 1, differentiable=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        images.sum().backward()


def test_what_overflows() -> None:
    model = random_model()
    with torch.no_grad():
        for block in model.blocks:
            block.proj_out.weight *= 20  # type: ignore[operator, union-attr]
    z = random_latents(model, 2)
    assert not model.reverse(z, differentiable=True).isfinite().all()
    with pytest.raises(NonFiniteError):
        model.reverse(z, differentiable=True, on_nonfinite="raise")


def test_memory_is_that_of_the_tokens_until_backward() -> None:
    """Between the passes autograd keeps x and z of each block, and no activations."""
    model = random_model(img_size=16)
    z, kept = random_latents(model, 2), []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.reverse(z, differentiable=True)
    parameters = {id(p) for p in model.parameters()}
    activations = sum(t.numel() for t in kept if id(t) not in parameters and not isinstance(t, nn.Parameter))
    config: TarFlowConfig = model.config
    assert activations <= (2 * config.num_blocks + 4) * z.numel() + sum(p.numel() for p in model.parameters())


def test_the_callers_autocast_is_in_no_gradient() -> None:
    model = random_model(img_size=6)
    z, found = random_latents(model, 2), []
    for enabled in (False, True):
        leaf = z.clone().requires_grad_()
        images = model.reverse(leaf, differentiable=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            images.float().square().sum().backward()
        assert leaf.grad is not None
        found.append(leaf.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("loss", [lambda x: x.sum(), lambda x: x.square().sum()], ids=["linear", "quadratic"])
def test_second_derivatives_are_refused_and_never_left_out(loss: Any) -> None:
    model = random_model()
    z = random_latents(model, 2).requires_grad_()
    (plain,) = torch.autograd.grad(loss(model.reverse(z, differentiable=True)), z)
    (gradient,) = torch.autograd.grad(loss(model.reverse(z, differentiable=True)), z, create_graph=True)
    assert torch.equal(gradient, plain)
    with pytest.raises(ArgumentError, match=r"^differentiable: expected first derivatives"):
        gradient.square().sum().backward()
