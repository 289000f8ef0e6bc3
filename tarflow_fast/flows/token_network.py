"""A bidirectional transformer over tokens, with time and class."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .velocity import TIME_FEATURES, time_features

NEAR = 5  # tokens that one sees at once


class TokenNetwork(nn.Module):
    """Logits (B, T, V) for every token of a sequence, of all of its tokens, the time and the class.

    Pre-norm layers of attention and an MLP, after a convolution over five tokens, as attention by learnt positions is
    slow to find the tokens beside one. The last layer begins at zero, so that it begins as the uniform law.
    """

    def __init__(self, tokens: int, inputs: int, outputs: int, num_classes: int, width: int, layers: int, heads: int):
        """tokens: T. inputs: the size of the alphabet that it reads. outputs: V. num_classes: C. width, layers, heads:
        of the transformer."""
        super().__init__()
        self.embed = nn.Embedding(inputs, width)
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.condition = nn.Sequential(
            nn.Linear(TIME_FEATURES + num_classes, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.near = nn.Conv1d(width, width, NEAR, padding=NEAR // 2)
        self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, outputs)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns logits, (B, T, V).

        x: (B, T) int64. t: () or (B,), time in [0, 1]. context: (B, C) one-hot classes, or None.
        """
        times = time_features(t.to(self.positions.dtype), len(x))
        given = times if context is None else torch.cat([times, context], dim=1)
        h = self.embed(x) + self.positions + self.condition(given).unsqueeze(1)
        h = h + self.near(h.transpose(1, 2)).transpose(1, 2)
        for layer in self.layers:
            h = layer(h)
        return self.leave(self.norm(h))


class _Layer(nn.Module):
    """h ← h + attention(norm(h)); h ← h + MLP(norm(h))."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h: Tensor) -> Tensor:
        B, T, width = h.shape
        q, k, v = self.qkv(self.norm(h)).view(B, T, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        h = h + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, width))
        return h + self.mlp(self.mlp_norm(h))
