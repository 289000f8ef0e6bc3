"""`accelerate` and `Sampler` take a module that computes what its weights say, and say so of one that does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import random_latents, random_model
from foreign import Foreign
from tolerances import GOLDEN, assert_close
from torch import Tensor, nn

import tarflow_fast as tff
from tarflow_fast import ArgumentError, Sampler, TarFlow, accelerate, reference
from tarflow_fast.models.flow_block import FlowBlock

SIZES = pytest.mark.parametrize("sizes", [{}, {"num_classes": 3}, {"nvp": False}], ids=str)


@SIZES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_module_that_agrees_is_taken_and_left_as_it_was(sizes: dict[str, Any], dtype: torch.dtype) -> None:
    theirs = Foreign(random_model(1, dtype, **sizes)).train()
    theirs.blocks[0].eval()
    modes, before = [each.training for each in theirs.modules()], copy.deepcopy(theirs.state_dict())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    fast = accelerate(theirs, dtype=torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert [each.training for each in theirs.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in theirs.state_dict().items())
    assert all(parameter.grad is None for parameter in theirs.parameters())
    assert fast.reverse(torch.zeros(1, 16, 4)).shape == (1, 1, 8, 8)


@SIZES
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_in_every_mode(sizes: dict[str, Any], mode: Any) -> None:
    with mode():
        accelerate(Foreign(random_model(**sizes)))


def shuffled(model: TarFlow) -> nn.Module:
    return Foreign(model, torch.randperm(16, generator=torch.Generator().manual_seed(0)))


def swapped(model: TarFlow) -> nn.Module:
    return Foreign(model, torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 15, 14]))


def other_heads(model: TarFlow) -> nn.Module:
    theirs = Foreign(model, head_dim=16)
    return theirs


def spoilt(model: TarFlow) -> nn.Module:
    theirs = Foreign(model)
    theirs.spoil = lambda z: z * 1.001
    return theirs


def other_log_det(model: TarFlow) -> nn.Module:
    theirs = Foreign(model)
    theirs.scale_log_det = 1.01
    return theirs


def hooked(model: TarFlow) -> nn.Module:
    theirs = Foreign(model)
    theirs.register_forward_hook(lambda module, given, out: (2 * out[0], out[1], out[2]))
    return theirs


def not_a_number(model: TarFlow) -> nn.Module:
    theirs = Foreign(model)
    theirs.spoil = lambda z: z * torch.nan
    return theirs


def another_result(model: TarFlow) -> nn.Module:
    theirs = Foreign(model)
    theirs.forward = lambda x, y=None: x  # type: ignore[method-assign]
    return theirs


def raising(model: TarFlow) -> nn.Module:
    theirs = Foreign(model)
    theirs.forward = lambda *_: 1 / 0  # type: ignore[method-assign]
    return theirs


CHANGES = [shuffled, swapped, other_heads, spoilt, other_log_det, hooked, not_a_number, another_result, raising]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("sizes", [{}, {"num_classes": 3}], ids=str)
def test_a_module_that_computes_another_thing_is_refused(change: Callable[[TarFlow], nn.Module], sizes: Any) -> None:
    theirs = change(random_model(**sizes))
    with pytest.raises(ArgumentError, match=r"^model: .*check=False"):
        accelerate(theirs)
    assert isinstance(accelerate(theirs, check=False), Sampler)


# Sampling laws


class LoopBlock(FlowBlock):
    """A block that samples by ml-tarflow's loop over tokens, however few they are."""

    def reverse(self, x: Tensor, y: Any = None, guidance: Any = 0, *rest: Any) -> Tensor:
        x, position = self.permutation(x).clone(), self.permutation(self.pos_embed, dim=0)
        self.seen = x.shape[1]
        self.set_sample_mode(True)
        for i in range(x.shape[1] - 1):
            a, b = self.reverse_step(x, position, i, y)
            if guidance > 0:
                a_u, b_u = self.reverse_step(x, position, i, None, which_cache="uncond")
                a, b = a + guidance * (a - a_u), b + guidance * (b - b_u)
            x[:, i + 1] = x[:, i + 1] * a[:, 0].exp() + b[:, 0]
        self.set_sample_mode(False)
        return self.permutation(x, inverse=True)


class ForeignSampler(Foreign):
    """One with ml-tarflow's `reverse`."""

    def __init__(self, model: TarFlow):
        super().__init__(model)
        for block in model.blocks:
            block.__class__ = LoopBlock
        self.unpatchify = model.unpatchify

    def reverse(self, x: Tensor, y: Tensor | None = None, guidance: float = 0) -> Tensor:
        x = x * self.var.sqrt()
        for block in reversed(self.blocks):
            x = block.reverse(x, y, guidance)
        return self.unpatchify(x)


class Cooler(ForeignSampler):
    def reverse(self, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        return super().reverse(0.99 * x, *arguments, **named)


class Relabelled(ForeignSampler):
    """Classes 1 and 2 change places, in sampling alone."""

    def reverse(self, x: Tensor, y: Tensor | None = None, guidance: float = 0) -> Tensor:
        y = None if y is None else torch.tensor([0, 2, 1, 3])[y]
        return super().reverse(x, y, guidance)


class MoreGuided(ForeignSampler):
    def reverse(self, x: Tensor, y: Tensor | None = None, guidance: float = 0) -> Tensor:
        return super().reverse(x, y, 2 * guidance)


class Clipped(ForeignSampler):
    def reverse(self, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        return super().reverse(x, *arguments, **named).clamp(-1, 1)


class Whole(Foreign):
    """One whose `reverse` does not go by its blocks."""

    def reverse(self, x: Tensor, y: Tensor | None = None, guidance: float = 0) -> Tensor:
        found = reference.inverse(self.state_dict(), x, y, guidance=guidance)
        return reference.unpatchify(found.x, self.patch_size)


class Louder(Whole):
    def reverse(self, *arguments: Any, **named: Any) -> Tensor:
        return 1.01 * super().reverse(*arguments, **named)


@pytest.mark.parametrize("sizes", [{}, {"num_classes": 4}, {"nvp": False, "num_blocks": 3}], ids=str)
@pytest.mark.parametrize("kind", [ForeignSampler, Whole])
def test_a_module_that_samples_as_we_do_is_taken(kind: type[nn.Module], sizes: Any) -> None:
    theirs: Any = kind(random_model(2, **sizes))
    before = copy.deepcopy(theirs.state_dict())
    accelerate(theirs)
    assert all(torch.equal(value, before[key]) for key, value in theirs.state_dict().items())
    if kind is ForeignSampler:  # and by a few tokens of a block
        assert all(block.seen < 16 and block._steps is None for block in theirs.blocks)


@pytest.mark.parametrize("kind", [Cooler, Relabelled, MoreGuided, Clipped, Louder])
def test_a_module_that_samples_by_another_law_is_refused(kind: type[nn.Module]) -> None:
    theirs = kind(random_model(num_classes=4))
    with pytest.raises(ArgumentError, match=r"^model: expected one whose reverse is .*check=False"):
        accelerate(theirs)
    assert isinstance(accelerate(theirs, check=False), Sampler)


def test_a_patched_reverse_is_refused_and_one_that_agrees_is_not() -> None:
    theirs: Any = ForeignSampler(random_model())
    plain = theirs.reverse
    theirs.reverse = lambda *arguments, **named: plain(*arguments, **named)
    accelerate(theirs)
    theirs.reverse = lambda *arguments, **named: -plain(*arguments, **named)
    with pytest.raises(ArgumentError, match=r"^model: expected one whose reverse"):
        accelerate(theirs)


@pytest.mark.parametrize(
    "labels",
    [
        lambda y: None if y is None else torch.tensor([0, 2, 1, 3])[y],
        lambda y: torch.zeros(2, dtype=torch.int64) if y is None else y,
    ],
    ids=["two change places", "none is the first"],
)
def test_every_class_and_none_are_compared(labels: Callable[[Any], Any]) -> None:
    theirs = Foreign(random_model(num_classes=4))
    plain = theirs.forward
    theirs.forward = lambda x, y=None: plain(x, labels(y))  # type: ignore[method-assign]
    with pytest.raises(ArgumentError, match=r"^model: expected one whose density pass"):
        accelerate(theirs)


class OwnReverse(TarFlow):
    def reverse(self, x: Tensor, *arguments: Any, **named: Any) -> Any:
        return super().reverse(0.5 * x, *arguments, **named)


def test_a_subclass_of_ours_with_a_reverse_of_its_own() -> None:
    model, z = random_model(num_blocks=3), torch.randn(2, 16, 4)
    mine = OwnReverse.from_config(model.config)
    mine.load_state_dict(model.state_dict())
    assert torch.equal(mine.reverse(z), model.reverse(0.5 * z))  # which may call ours
    assert torch.equal(mine.reverse(z, differentiable=True), model.reverse(0.5 * z, differentiable=True))
    for make in (Sampler, accelerate):
        with pytest.raises(ArgumentError, match=r"^model: .* TarFlow.reverse .*check=False.*OwnReverse.reverse"):
            make(mine)  # type: ignore[operator]
    assert torch.equal(accelerate(mine, check=False).reverse(z), Sampler(model).reverse(z))


@pytest.mark.parametrize("name", ["reverse", "reverse_step"])
def test_a_block_of_ours_that_samples_by_itself_is_refused(name: str) -> None:
    model = random_model()
    block: Any = model.blocks[1]
    block.__dict__[name] = getattr(block, name)
    for make in (Sampler, accelerate, lambda model: model.reverse(torch.zeros(1, 16, 4))):
        with pytest.raises(ArgumentError, match=rf"^model: .* FlowBlock\.{name} does"):
            make(model)


def test_weights_without_a_forward_pass_are_taken() -> None:
    model, theirs = random_model(), nn.Module()
    theirs.blocks, theirs.patch_size = model.blocks, model.patch_size
    theirs.register_buffer("var", model.var)
    assert isinstance(accelerate(theirs), Sampler)


def test_parameters_beyond_a_tarflows_are_refused() -> None:
    theirs = Foreign(random_model())
    theirs.temperature = nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match="unknown tensors, temperature"):
        accelerate(theirs)


# Our own models, whose parts were exchanged


def test_a_hook_that_looks_is_no_obstacle_and_one_that_changes_is() -> None:
    model, seen = random_model(), []
    z = random_latents(model, 2)
    wanted = Sampler(model).reverse(z)
    model.blocks[0].register_forward_hook(lambda module, given, out: seen.append(out))
    assert torch.equal(Sampler(model).reverse(z), wanted)
    handle = model.blocks[1].attn_blocks[0].register_forward_hook(lambda module, given, out: 2 * out)  # type: ignore
    for make in (Sampler, accelerate):
        with pytest.raises(ArgumentError, match=r"^model: "):
            make(model)
    handle.remove()
    assert torch.equal(accelerate(model).reverse(z), wanted)


def test_blocks_in_another_order_keep_the_order_of_their_tokens(tmp_path: Path) -> None:
    model, x = random_model(), torch.randn(2, 1, 8, 8)
    model.blocks = nn.ModuleList([model.blocks[1], model.blocks[0]])
    with torch.no_grad():
        z, _, log_det = model(x)
        for found, wanted in zip((z, log_det), model.set_density("torch")(x)[::2], strict=True):
            assert_close(found, wanted, GOLDEN)
    for backend in ("torch", "auto"):
        assert_close(Sampler(model, backend=backend).reverse(z), x, GOLDEN)
    with pytest.raises(ArgumentError, match=r"^model: expected blocks that read the tokens in turns"):
        tff.save(model, tmp_path / "m.safetensors")


def test_a_patched_forward_pass_is_heeded() -> None:
    model, x = random_model(), torch.randn(2, 1, 8, 8)
    block = model.blocks[0]
    plain = block.forward
    block.forward = lambda x, y=None: (2 * plain(x, y)[0], plain(x, y)[1])  # type: ignore
    with torch.no_grad():
        assert torch.equal(model(x)[0], model.set_density("torch")(x)[0])
    with pytest.raises(ArgumentError, match=r"^model: "):
        Sampler(model)


def test_a_wrapped_model_keeps_what_it_records() -> None:
    model = random_model(num_classes=2)
    model.metadata = {"class_names": ["cat", "dog"]}
    assert accelerate(nn.DataParallel(model)).sample(1, "dog").labels is not None
