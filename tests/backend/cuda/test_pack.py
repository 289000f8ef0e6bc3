"""How the CUDA engine packs weights: in the order of tensor cores, with layer norms folded in."""

from __future__ import annotations

import pytest
import torch
from cases import random_model

from tarflow_fast.backend.cuda.pack import TILE, linear_sizes, pack, pack_linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(16, 16), (1, 1), (20, 40), (48, 17)])
def test_packed_tiles_are_those_of_tensor_cores(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Against the layout of mma.m16n8k16's first operand as the PTX manual has it, element by element."""
    weight = torch.randn(shape)
    packed = pack_linear(weight, dtype)
    N, K = shape
    assert packed.shape == (-(-N // TILE), -(-K // TILE), 256)
    for tile, k_tile in torch.cartesian_prod(*map(torch.arange, packed.shape[:2])).tolist():
        for i in range(256):
            if dtype == torch.float32:
                row, column = i // 16, i % 16
            else:
                lane, of_lane = i // 8, i % 8
                row = lane // 4 + 8 * (of_lane in (2, 3, 6, 7))
                column = 2 * (lane % 4) + of_lane % 2 + 8 * (of_lane >= 4)
            n, k = tile * TILE + row, k_tile * TILE + column
            wanted = weight[n, k].to(dtype) if n < N and k < K else torch.zeros((), dtype=dtype)
            assert packed[tile, k_tile, i] == wanted


def test_layer_norms_are_folded_in() -> None:
    """W (γ·y + β) + b, for the two layers after a LayerNorm, and the others as they are."""
    model = random_model(3, channels=32, head_dim=16, layers_per_block=2)
    weights = model.block_weights(0)
    packed, biases = pack(weights, torch.device("cpu"), torch.float32)
    sizes = linear_sizes(model.config.block_shape)
    y = torch.randn(32)
    layer = weights.layers[1]
    plain = [
        (weights.proj_in_weight, weights.proj_in_bias, torch.randn(4)),
        *[None] * 4,
        (layer.qkv_weight, layer.qkv_bias, y * layer.norm1_weight + layer.norm1_bias, y),
        (layer.proj_weight, layer.proj_bias, torch.randn(32)),
        (layer.fc1_weight, layer.fc1_bias, y * layer.norm2_weight + layer.norm2_bias, y),
        (layer.fc2_weight, layer.fc2_bias, torch.randn(128)),
        (weights.proj_out_weight, weights.proj_out_bias, torch.randn(32)),
    ]
    at = bias_at = 0
    for (tiles, k_tiles, *_), linear in zip(sizes, plain, strict=True):
        count = tiles * k_tiles * 256
        matrix = packed[at : at + count].view(tiles, k_tiles, 16, 16).transpose(1, 2).reshape(tiles * 16, -1)
        bias = biases[bias_at : bias_at + tiles * 16]
        at, bias_at = at + count, bias_at + tiles * 16
        if linear is None:
            continue
        weight, wanted_bias, *inputs = linear
        N, K = weight.shape
        torch.testing.assert_close(matrix[:N, :K] @ inputs[-1] + bias[:N], weight @ inputs[0] + wanted_bias)
        assert not matrix[N:].any()
        assert not matrix[:, K:].any()
        assert not bias[N:].any()
    assert at == packed.numel()
    assert bias_at == biases.numel()
