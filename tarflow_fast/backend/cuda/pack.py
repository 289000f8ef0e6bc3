"""The weights of a flow block as the CUDA kernel streams them: tiles of 16 outputs × 16 inputs, one after the other.

    W (γ·y + β) + b = (W γ) y + (W β + b)

By this equation, LayerNorm's γ and β are folded into the product after it. The layers are in the order in which a token
meets them: proj_in, then qkv, proj, fc1, fc2 of each layer, then proj_out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...engine.shape import BlockShape
from ...engine.weights import BlockWeights

TILE = 16


class LinearSize(NamedTuple):
    """The size of a packed layer in tiles: `tiles` along its outputs, `k_tiles` along its inputs.

    halvings: how often its inputs are halved. groups: into how many groups its rows are divided. So 2^halvings · groups
    blocks share a tile of outputs.
    """

    tiles: int
    k_tiles: int
    halvings: int = 0
    groups: int = 1

    @property
    def parts(self) -> int:
        """Returns how many blocks share a tile: all parts of the inputs for the first group of rows, then the next."""
        return self.groups << self.halvings

    def inputs(self, part: int) -> tuple[int, int]:
        """Returns the first tile of a part's inputs, and the one after its last.

        part: from 0 to parts − 1.
        """
        part %= 1 << self.halvings
        return self.k_tiles * part >> self.halvings, self.k_tiles * (part + 1) >> self.halvings


def linear_sizes(shape: BlockShape) -> list[LinearSize]:
    """Returns the sizes of the packed layers, in their order."""
    C, D, hidden = shape.channels, shape.token_dim, shape.hidden

    def size(outputs: int, inputs: int) -> LinearSize:
        return LinearSize(-(-outputs // TILE), -(-inputs // TILE))

    layer = [size(3 * C, C), size(C, C), size(hidden, C), size(C, hidden)]
    return [size(C, D), *layer * shape.layers, size(shape.parameters, C)]


def pack_linear(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a weight (N, K) as (tiles, k_tiles, 256), with zeros beyond N and K.

    In fp32 a tile is 16 rows of 16. In a half precision it is in the order of tensor cores: each lane has 8 elements of
    its own, W[g][2t, 2t+1], W[g+8][2t, 2t+1], W[g][2t+8, 2t+9], W[g+8][2t+8, 2t+9], where
    g = lane // 4 and t = lane % 4.
    """
    N, K = weight.shape
    tiles, k_tiles = -(-N // TILE), -(-K // TILE)
    padded = F.pad(weight, (0, k_tiles * TILE - K, 0, tiles * TILE - N)).to(dtype)
    if dtype == torch.float32:
        order = padded.view(tiles, TILE, k_tiles, TILE).permute(0, 2, 1, 3)
    else:
        #                     (tile, low or high, g, k_tile, left or right, t, of two)
        order = padded.view(tiles, 2, 8, k_tiles, 2, 4, 2).permute(0, 3, 2, 5, 4, 1, 6)
    return order.reshape(tiles, k_tiles, TILE * TILE)


def pack(weights: BlockWeights, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns (weights, biases) of all packed layers, both 1-D, the weights in `dtype` and the biases in fp32."""
    sizes = linear_sizes(weights.shape)
    packed = torch.empty(sum(size.tiles * size.k_tiles for size in sizes), TILE * TILE, dtype=dtype, device=device)
    biases = torch.zeros(sum(size.tiles for size in sizes) * TILE, dtype=torch.float32, device=device)
    at = bias_at = 0
    for (weight, bias), (tiles, k_tiles, *_) in zip(_linears(weights, device), sizes, strict=True):
        packed[at : at + tiles * k_tiles] = pack_linear(weight, dtype).flatten(0, 1)
        biases[bias_at : bias_at + bias.numel()] = bias
        at, bias_at = at + tiles * k_tiles, bias_at + tiles * TILE
    return packed.flatten(), biases


def _linears(weights: BlockWeights, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the weight and bias of each layer, fp32 on the device, with LayerNorms folded in."""

    def plain(x: Tensor) -> Tensor:
        return x.detach().to(device, torch.float32)

    def folded(weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        weight = plain(weight)
        return weight * plain(gamma), plain(bias) + (weight.double() @ plain(beta).double()).float()

    yield plain(weights.proj_in_weight), plain(weights.proj_in_bias)
    for layer in weights.layers:
        yield folded(layer.qkv_weight, layer.qkv_bias, layer.norm1_weight, layer.norm1_bias)
        yield plain(layer.proj_weight), plain(layer.proj_bias)
        yield folded(layer.fc1_weight, layer.fc1_bias, layer.norm2_weight, layer.norm2_bias)
        yield plain(layer.fc2_weight), plain(layer.fc2_bias)
    yield plain(weights.proj_out_weight), plain(weights.proj_out_bias)
