"""One flow block as it is trained: a causal transformer, and the affine transform that it determines.

Modules and state-dict keys are those of the published `ml-tarflow`. This is the differentiable density pass of one
block; its inverse lives in `engine/`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import causal_attention
from .config import TarFlowConfig
from .ops import affine_density

EXPANSION = 4


def stream_dtype(weight_dtype: torch.dtype) -> torch.dtype:
    """dtype of the residual stream, the norms, exp and log-det: fp32, or fp64 for a float64 model."""
    return torch.float64 if weight_dtype == torch.float64 else torch.float32


def _norm(norm: nn.LayerNorm, x: Tensor, dtype: torch.dtype) -> Tensor:
    """LayerNorm with its statistics in the stream's dtype; the result in the dtype of the weights that follow."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps).to(dtype)


class Attention(nn.Module):
    def __init__(self, channels: int, head_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, channels * 3)
        self.proj = nn.Linear(channels, channels)
        self.num_heads = channels // head_dim
        self.backend = "auto"

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(_norm(self.norm, x, self.qkv.weight.dtype))
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(-3)  # each (B, T, H, d)
        out: Tensor = self.proj(causal_attention(q, k, v, self.backend).flatten(-2))
        return out


class MLP(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        up = nn.Linear(channels, channels * EXPANSION)
        self.main = nn.Sequential(up, nn.GELU(), nn.Linear(channels * EXPANSION, channels))

    def forward(self, x: Tensor) -> Tensor:
        dtype = next(self.main.parameters()).dtype
        out: Tensor = self.main(_norm(self.norm, x, dtype))
        return out


class AttentionBlock(nn.Module):
    """One pre-norm transformer layer on a residual stream in fp32."""

    def __init__(self, channels: int, head_dim: int):
        super().__init__()
        self.attention = Attention(channels, head_dim)
        self.mlp = MLP(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        x = x + self.mlp(x)
        return x


class FlowBlock(nn.Module):
    """One flow block: permute, then transform token i+1 by what a causal transformer says after token i."""

    attn_mask: Tensor

    def __init__(self, config: TarFlowConfig, flip: bool):
        super().__init__()
        C, T, D = config.channels, config.num_patches, config.token_dim
        self.flip = flip
        self.nvp = config.nvp
        self.proj_in = nn.Linear(D, C)
        self.pos_embed = nn.Parameter(torch.empty(T, C))
        self.class_embed = nn.Parameter(torch.empty(config.num_classes, 1, C)) if config.num_classes else None
        self.attn_blocks = nn.ModuleList([AttentionBlock(C, config.head_dim) for _ in range(config.layers_per_block)])
        self.proj_out = nn.Linear(C, 2 * D if config.nvp else D)
        # Unused here (attention is causal by flag); kept so that the state dict is ml-tarflow's.
        self.register_buffer("attn_mask", torch.ones(T, T))
        if not self.pos_embed.is_meta:  # a model without storage, for its shapes alone, needs no values
            self._initialise()

    def _initialise(self) -> None:
        for embedding in (self.pos_embed, self.class_embed):
            if embedding is not None:
                nn.init.normal_(embedding, std=1e-2)
        nn.init.zeros_(self.proj_out.weight)
        self.attn_mask.tril_()

    def _class_embedding(self, y: Tensor | None) -> Tensor | None:
        """(B, 1, C), or (1, C) without labels: the label's embedding, the mean of all for a label < 0."""
        if self.class_embed is None:
            return None
        mean = self.class_embed.mean(dim=0)
        if y is None:
            return mean
        return torch.where((y < 0).view(-1, 1, 1), mean, self.class_embed[y.clamp(min=0)])

    def transform(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z_0 = x_0, z_{i+1} = (x_{i+1} − xb_i) · exp(−xa_i), in the block's own token order.

        x: (B, T, D); y: (B,) int64 or None. Returns z (B, T, D) in x's token order and the log-det of each token,
        (B, T) in the block's order: −Σ_d xa in nats, 0 for the token that passes unchanged. Both fp32 or wider.
        """
        dtype = self.proj_in.weight.dtype
        stream = stream_dtype(dtype)
        x = x.to(stream)
        tokens, pos = (x.flip(1), self.pos_embed.flip(0)) if self.flip else (x, self.pos_embed)
        h = self.proj_in(tokens.to(dtype)).to(stream) + pos
        embedding = self._class_embedding(y)
        if embedding is not None:
            h = h + embedding
        for block in self.attn_blocks:
            h = block(h)
        return affine_density(self.proj_out(h.to(dtype)), x, self.nvp, self.flip)

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `transform`, with the log-det averaged over all T·D values, (B,), as in ml-tarflow."""
        z, log_det = self.transform(x, y)
        return z, log_det.sum(1) / (x.shape[1] * x.shape[2])
