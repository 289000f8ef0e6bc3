"""Random weights for a block of given sizes, with which its inverse behaves like a trained model's."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine.shape import BlockShape
from ..engine.weights import BlockWeights, LayerWeights

SHARPNESS = 2.5  # queries and keys are so much larger than at initialisation: attention then depends on single keys


def random_weights(shape: BlockShape, seed: int) -> BlockWeights:
    """Returns fp32 weights on the CPU that depend on the shape and the seed alone.

    Log-scales are of some tenths, every norm and bias is in use, and attention is sharp, so that a key too many or too
    few shows in the result.
    """
    generator = torch.Generator().manual_seed(seed)
    C, F = shape.channels, shape.hidden

    def uniform(*sizes: int, scale: float = 1.0) -> Tensor:
        return (2 * torch.rand(sizes, generator=generator, device="cpu", dtype=torch.float32) - 1) * scale

    def matrix(out: int, width: int, scale: float = 1.0) -> Tensor:
        return uniform(out, width, scale=scale * width**-0.5)

    def layer() -> LayerWeights:
        qkv = matrix(3 * C, C)
        qkv[: 2 * C] *= SHARPNESS
        return LayerWeights(
            norm1_weight=1 + uniform(C, scale=0.3),
            norm1_bias=uniform(C, scale=0.1),
            qkv_weight=qkv,
            qkv_bias=uniform(3 * C, scale=0.1),
            proj_weight=matrix(C, C),
            proj_bias=uniform(C, scale=0.1),
            norm2_weight=1 + uniform(C, scale=0.3),
            norm2_bias=uniform(C, scale=0.1),
            fc1_weight=matrix(F, C),
            fc1_bias=uniform(F, scale=0.1),
            fc2_weight=matrix(C, F),
            fc2_bias=uniform(C, scale=0.1),
        )

    return BlockWeights(
        shape=shape,
        proj_in_weight=matrix(C, shape.token_dim),
        proj_in_bias=uniform(C, scale=0.1),
        position=uniform(shape.tokens, C, scale=0.5),
        classes=uniform(shape.classes + 1, C, scale=0.5) if shape.classes else None,
        layers=tuple(layer() for _ in range(shape.layers)),
        proj_out_weight=matrix(shape.parameters, C, scale=0.4),
        proj_out_bias=uniform(shape.parameters, scale=0.1),
    )
