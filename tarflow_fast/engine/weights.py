"""A flow block's weights as engines take them: plain tensors in the block's own token order."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .shape import BlockShape


@dataclass(frozen=True)
class LayerWeights:
    """The weights of one transformer layer. Weights of linear layers are (out, in), as in torch."""

    norm1_weight: Tensor  # (C,)
    norm1_bias: Tensor
    qkv_weight: Tensor  # (3C, C), rows ordered (q|k|v, head, channel)
    qkv_bias: Tensor
    proj_weight: Tensor  # (C, C)
    proj_bias: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor
    fc1_weight: Tensor  # (F, C), F = shape.hidden
    fc1_bias: Tensor
    fc2_weight: Tensor  # (C, F)
    fc2_bias: Tensor


@dataclass(frozen=True)
class BlockWeights:
    """The sizes and weights of a flow block. The tensors may have any float dtype and be on any one device."""

    shape: BlockShape
    proj_in_weight: Tensor  # (C, D)
    proj_in_bias: Tensor
    position: Tensor  # (T, C), in the block's token order
    classes: Tensor | None  # (classes + 1, C); the last row is for "no class"
    layers: tuple[LayerWeights, ...]
    proj_out_weight: Tensor  # (2D, C), or (D, C) for volume-preserving blocks
    proj_out_bias: Tensor
