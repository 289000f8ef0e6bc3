"""The inverse of a single flow block, for scripts that go through the blocks themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from . import serial
from .checks import Flag, Labels, Number, batch_labels, check_dense, check_tensor
from .engine import Condition, Guidance, block_weights, choose_backend, make_engines
from .flow_block import FlowBlock, stream_dtype
from .scalars import plain
from .solvers import sequential


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
    """See `FlowBlock.reverse`."""
    config, k = block.config, int(block.flip)
    x = check_tensor("x", x, (config.num_patches, config.token_dim), finite=False)
    check_dense("x", x)
    weight = block.proj_in.weight
    kind, dtype = weight.device.type, weight.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    rule = Guidance(plain(guidance), guide_what, plain(attn_temp), plain(annealed_guidance))
    condition = Condition(batch_labels(y, x.shape[0], config.num_classes, weight.device), rule)
    weights = block_weights({f"blocks.{k}.{key}": value for key, value in block.state_dict().items()}, config, k)
    backend, _ = choose_backend("auto", weight.device, dtype, False)
    (engine,) = make_engines(backend, [weights], device=weight.device, dtype=dtype, compile=False)
    z = x.detach().to(weight.device, stream_dtype(dtype))
    state = engine.begin(serial.flipped(z) if block.flip else z, condition)
    sequential(engine, state, None)
    return (serial.flipped(state.x) if block.flip else state.x).to(x.device)
