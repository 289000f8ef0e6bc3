"""`accelerate` and `Sampler` take a module that computes what its weights say, and say so of one that does not; flow
blocks refuse what they would not look at."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import random_latents, random_model
from tolerances import GOLDEN, INVERSE_F64, assert_close
from torch import Tensor, nn

from tarflow_fast import ArgumentError, Sampler, TarFlow, accelerate, reference
from tarflow_fast.config import TarFlowConfig


class Foreign(nn.Module):
    """Somebody else's TarFlow, by the plain equations: a state dict, patch_size, and a density pass of its own.

    order: a permutation of the tokens of block 0 beside the block's own.
    """

    def __init__(self, model: TarFlow, order: Tensor | None = None, head_dim: int = 64):
        super().__init__()
        self.blocks, self.patch_size, self.order, self.head_dim = model.blocks, model.patch_size, order, head_dim
        self.register_buffer("var", model.var)
        self.spoil: Callable[[Tensor], Tensor] = lambda z: z
        self.scale_log_det = 1.0

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, list[Tensor], Tensor]:
        tokens = reference.patchify(x, self.patch_size)
        tokens = tokens if self.order is None else tokens[:, self.order]
        found = reference.density(self.state_dict(), tokens, y, head_dim=self.head_dim)
        z = self.spoil(found.z)
        return z, [*found.outputs[:-1], z], self.scale_log_det * found.log_det / z[0].numel()


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


def test_blocks_in_another_order_are_refused() -> None:
    model = random_model()
    model.blocks = nn.ModuleList([model.blocks[1], model.blocks[0]])
    with pytest.raises(ArgumentError, match=r"^model: "):
        Sampler(model)
    with torch.no_grad():  # and the pass in C++ leaves it to PyTorch's
        x = torch.randn(2, 1, 8, 8)
        assert torch.equal(model(x)[0], model.set_density("torch")(x)[0])


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


# ml-tarflow's names of a block


class Shuffle(nn.Module):
    def __init__(self, order: Tensor):
        super().__init__()
        self.order = order

    def forward(self, x: Tensor, dim: int = 1, inverse: bool = False) -> Tensor:
        return x.index_select(dim, self.order.argsort() if inverse else self.order)


def test_permutation() -> None:
    model, x = random_model(num_blocks=2), torch.randn(3, 16, 4)
    first, second = model.blocks
    assert torch.equal(first.permutation(x), x)  # type: ignore[operator]
    assert torch.equal(second.permutation(x), x.flip(1))  # type: ignore[operator]
    assert torch.equal(second.permutation(x[0], dim=0, inverse=True), x[0].flip(0))  # type: ignore[operator]
    first.permutation = Shuffle(torch.arange(16))
    second.permutation = Shuffle(torch.arange(15, -1, -1))
    swap = torch.tensor([1, 0, *range(2, 16)])
    others: list[Any] = [Shuffle(swap), Shuffle(torch.arange(8)), None, second.permutation, lambda x: x]
    for other in others:
        with pytest.raises(ArgumentError, match=r"^permutation: "):
            first.permutation = other
    copy.deepcopy(model).blocks[0].permutation = first.permutation


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        (lambda m: m.blocks[0], "flip", True),
        (lambda m: m.blocks[0], "nvp", False),
        (lambda m: m.blocks[0], "reversed", True),
        (lambda m: m.blocks[0], "shape", TarFlowConfig(1, 8, 4, 64, 1, 1).block_shape),
        (lambda m: m.blocks[0].attn_blocks[0], "attn_temp", 2.0),
        (lambda m: m.blocks[0].attn_blocks[0].attention, "num_heads", 2),
        (lambda m: m.blocks[0].attn_blocks[0].attention, "sqrt_scale", 0.5),
        (lambda m: m.blocks[0].attn_blocks[0].attention, "sample", True),
        (lambda m: m.blocks[0].attn_blocks[0].mlp, "dropout", nn.Dropout()),
    ],
)
def test_what_a_block_would_not_look_at_is_refused(where: Callable[[Any], Any], name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=name):
        setattr(where(random_model()), name, value)


def test_what_a_block_has_may_be_set() -> None:
    model = random_model()
    block: Any = model.blocks[0]
    block.proj_out, block.nvp, block._note = nn.Linear(64, 8), True, "mine"
    block.pos_embed = nn.Parameter(torch.zeros(16, 64))

    class Mine(type(block)):  # type: ignore[misc]
        pass

    mine = Mine(model.config.block_shape, model.config.permutation(0))
    mine.whatever = 1


RULES: list[dict[str, Any]] = [{}, {"guidance": 1.5, "guide_what": "a", "attn_temp": 0.7, "annealed_guidance": True}]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("nvp", [True, False])
def test_reverse_of_a_block(rule: dict[str, Any], nvp: bool) -> None:
    model, y = random_model(num_classes=3, nvp=nvp), torch.tensor([2, -1])
    z = random_latents(model, 2)
    given = z.clone()
    for k, block in enumerate(model.blocks):
        got = block.reverse(z, y, **rule)  # type: ignore[operator]
        assert_close(got, reference.block_inverse(model.state_dict(), k, z, y, **rule)[0], GOLDEN)
    assert torch.equal(z, given)


@pytest.mark.parametrize("nvp", [True, False])
def test_a_loop_over_tokens_by_reverse_step(nvp: bool) -> None:
    model, y = random_model(2, torch.float64, num_classes=3, nvp=nvp, layers_per_block=2), torch.tensor([2, -1])
    z = random_latents(model, 2)
    for k, module in enumerate(model.blocks):
        block: Any = module
        with pytest.raises(ArgumentError, match="set_sample_mode"):
            block.reverse_step(z, block.pos_embed, 0)
        x, position = block.permutation(z).clone(), block.permutation(block.pos_embed, dim=0)
        block.set_sample_mode(True)
        with torch.no_grad():
            for i in range(15):
                (a, b), (a_u, b_u) = (
                    block.reverse_step(x, position, i, labels, temp, which)
                    for labels, temp, which in ((y, 1.0, "cond"), (None, 0.7, "uncond"))
                )
                a, b = a + 1.5 * (a - a_u), b + 1.5 * (b - b_u)
                x[:, i + 1] = x[:, i + 1] * a[:, 0].exp() + b[:, 0]
        block.set_sample_mode(False)
        wanted, _ = reference.block_inverse(model.state_dict(), k, z, y, guidance=1.5, attn_temp=0.7)
        assert_close(block.permutation(x, inverse=True), wanted, INVERSE_F64)
