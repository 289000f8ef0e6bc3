"""ml-tarflow's names of a block: its permutation, `reverse` and `reverse_step`, and what may be set."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import random_latents, random_model
from tolerances import GOLDEN, INVERSE_F64, assert_close
from torch import Tensor, nn

from tarflow_fast import ArgumentError, reference
from tarflow_fast.models.config import TarFlowConfig


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
