"""This module inverts a single flow block, for scripts that go through the blocks themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backend import choose_backend, make_engines
from ..checks import Flag, Labels, Number, batch_labels, check_dense, check_tensor
from ..dtypes import residual_dtype
from ..engine import Condition, Guidance
from ..engine.backend import Request
from ..scalars import plain
from ..solvers import sequential

if TYPE_CHECKING:
    from .flow_block import FlowBlock


@torch.no_grad()
def invert_block(
    block: FlowBlock,
    x: Tensor,
    y: Labels,
    guidance: Number,
    guide_what: str,
    attn_temp: Number,
    annealed_guidance: Flag,
) -> Tensor:
    """Returns what the block makes of latents x, (B, T, D) both; see `FlowBlock.reverse` for the arguments."""
    shape, order = block.shape, block.permutation
    x = check_tensor("x", x, (shape.tokens, shape.token_dim), finite=False)
    check_dense("x", x)
    weight = block.proj_in.weight
    kind, dtype = weight.device.type, weight.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    classifier_free = Guidance(plain(guidance), guide_what, plain(attn_temp), plain(annealed_guidance))
    condition = Condition(batch_labels(y, x.shape[0], shape.classes, weight.device), classifier_free)
    request = Request(weight.device, dtype)
    backend, _ = choose_backend("auto", request)
    (engine,) = make_engines(backend, [block.weights()], request)
    z = x.detach().to(weight.device, residual_dtype(dtype))
    state = engine.begin(order.enter(z), condition)
    sequential(engine, state, None)
    return order.leave(state.x).to(x.device)
