"""A flow block's weights as engines take them: plain tensors in the block's own token order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import TarFlowConfig


@dataclass(frozen=True)
class LayerWeights:
    """One transformer layer. Linear weights are (out, in), as in torch."""

    norm1_weight: Tensor  # (C,)
    norm1_bias: Tensor
    qkv_weight: Tensor  # (3C, C), rows ordered (q|k|v, head, channel)
    qkv_bias: Tensor
    proj_weight: Tensor  # (C, C)
    proj_bias: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor
    fc1_weight: Tensor  # (4C, C)
    fc1_bias: Tensor
    fc2_weight: Tensor  # (C, 4C)
    fc2_bias: Tensor


@dataclass(frozen=True)
class BlockWeights:
    config: TarFlowConfig
    proj_in_weight: Tensor  # (C, D)
    proj_in_bias: Tensor
    position: Tensor  # (T, C), in the block's token order
    classes: Tensor | None  # (num_classes + 1, C); the last row, "no class", is the mean of the others
    layers: tuple[LayerWeights, ...]
    proj_out_weight: Tensor  # (2D, C), or (D, C) for volume-preserving blocks
    proj_out_bias: Tensor


_LAYER_KEYS = {
    "norm1": "attention.norm",
    "qkv": "attention.qkv",
    "proj": "attention.proj",
    "norm2": "mlp.norm",
    "fc1": "mlp.main.0",
    "fc2": "mlp.main.2",
}


def block_weights(state_dict: Mapping[str, Tensor], config: TarFlowConfig, k: int) -> BlockWeights:
    """Block k of an ml-tarflow state dict. Tensors are shared with it where no flip or mean is needed."""
    block = {
        key.removeprefix(f"blocks.{k}."): value.detach()
        for key, value in state_dict.items()
        if key.startswith(f"blocks.{k}.")
    }
    position = block["pos_embed"]
    classes = None
    if config.num_classes:
        embedding = block["class_embed"].squeeze(1)
        classes = torch.cat([embedding, embedding.mean(dim=0, keepdim=True)])
    layers = tuple(
        LayerWeights(
            **{
                f"{ours}_{part}": block[f"attn_blocks.{layer}.{theirs}.{part}"]
                for ours, theirs in _LAYER_KEYS.items()
                for part in ("weight", "bias")
            }
        )
        for layer in range(config.layers_per_block)
    )
    return BlockWeights(
        config=config,
        proj_in_weight=block["proj_in.weight"],
        proj_in_bias=block["proj_in.bias"],
        position=position.flip(0) if k % 2 else position,
        classes=classes,
        layers=layers,
        proj_out_weight=block["proj_out.weight"],
        proj_out_bias=block["proj_out.bias"],
    )
