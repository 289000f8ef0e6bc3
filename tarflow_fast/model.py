"""TarFlow (Zhai et al., arXiv 2412.06329): a stack of autoregressive affine flows made of causal transformers.

Constructor, methods and state-dict keys are those of the published `ml-tarflow`, so that either code loads the
other's checkpoints. This file is the differentiable density pass; the inverse lives in `engine/` and `solvers/`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import ATTENTION_BACKENDS, causal_attention
from .checks import batch_labels, check_choice, check_tensor, short
from .config import TarFlowConfig
from .errors import ArgumentError
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


class TarFlow(nn.Module):
    """A TarFlow model, interchangeable with ml-tarflow's `Model`.

    Arguments: see `TarFlowConfig`. Attributes beyond ml-tarflow's: `config`, and `metadata`, a dict of what a
    checkpoint knows besides weights: "noise_std" (float), "noise_type" ("gaussian" or "uniform"), "class_names".
    """

    VAR_LR: float = 0.1
    var: Tensor

    def __init__(
        self,
        in_channels: int,
        img_size: int,
        patch_size: int,
        channels: int,
        num_blocks: int,
        layers_per_block: int,
        nvp: bool = True,
        num_classes: int = 0,
        head_dim: int = 64,
    ):
        super().__init__()
        self.config = config = TarFlowConfig(
            in_channels, img_size, patch_size, channels, num_blocks, layers_per_block, nvp, num_classes, head_dim
        )
        self.metadata: dict[str, Any] = {}
        self.img_size, self.patch_size, self.num_patches = img_size, patch_size, config.num_patches
        self.blocks = nn.ModuleList([FlowBlock(config, flip=k % 2 == 1) for k in range(num_blocks)])
        # The prior's variance: ones in nvp models, learnt by update_prior in volume-preserving ones.
        self.register_buffer("var", torch.ones(config.num_patches, config.token_dim))

    @classmethod
    def from_config(cls, config: TarFlowConfig) -> TarFlow:
        return cls(**config.to_dict())

    @property
    def device(self) -> torch.device:
        return self.var.device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def set_attention(self, backend: str) -> TarFlow:
        """Attention of the density pass: "auto", "sdpa" or "flash" (see `causal_attention`). Returns self."""
        check_choice("attention", backend, ATTENTION_BACKENDS)
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = backend
        return self

    def patchify(self, x: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) to tokens (B, T, D), D ordered (channel, row, column)."""
        x = check_tensor("x", x, self.config.image_shape, finite=False)
        return F.unfold(x, self.patch_size, stride=self.patch_size).transpose(1, 2)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Tokens (B, T, D) to images (B, in_channels, H, W); the inverse of patchify."""
        x = check_tensor("x", x, tuple(self.var.shape), finite=False)
        size = (self.img_size, self.img_size)
        return F.fold(x.transpose(1, 2), size, self.patch_size, stride=self.patch_size)

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, list[Tensor], Tensor]:
        """The density pass, x to z, under ml-tarflow's conventions.

        x: (B, in_channels, H, W) float; y: (B,) integer labels, negative for no class, or None.
        Returns z (B, T, D), the output of every block [(B, T, D)] * K, and the log-det (B,) as a *mean* over T·D.
        """
        x = self.patchify(x)
        y = batch_labels(y, x.shape[0], self.config.num_classes, x.device)
        outputs: list[Tensor] = []
        log_det = torch.zeros((), device=x.device)
        for block in self.blocks:
            x, block_log_det = block(x, y)
            log_det = log_det + block_log_det
            outputs.append(x)
        return x, outputs, log_det

    def get_loss(self, z: Tensor, logdets: Tensor) -> Tensor:
        """½ mean(z²) − mean(log-det): the negative log-likelihood per value in nats, less ½ log 2π."""
        return 0.5 * z.pow(2).mean() - logdets.mean()

    def update_prior(self, z: Tensor) -> None:
        """var ← var + VAR_LR (mean_B z² − var), a moving average; z: (B, T, D), finite. Mutates `var`."""
        z = check_tensor("z", z, tuple(self.var.shape))
        self.var.lerp_(z.detach().pow(2).mean(dim=0).to(self.var.dtype), weight=self.VAR_LR)

    def log_prob(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """log p(x | y) = log N(z; 0, diag var) + log|det dz/dx|, in nats.

        x: (B, in_channels, H, W), finite, on the scale the model was trained on ([-1, 1] for images); y as in
        `forward`. Returns (B,). It is a density over the values of x: for 8-bit images see `bits_per_dim`.
        """
        x = check_tensor("x", x, self.config.image_shape)
        z, _, mean_log_det = self.forward(x, y)
        return self.prior_log_prob(z) + mean_log_det * z[0].numel()

    def prior_log_prob(self, z: Tensor) -> Tensor:
        """log N(z; 0, diag var) in nats; z: (B, T, D). Returns (B,)."""
        var = self.var.to(z.dtype)
        return -0.5 * (z.square() / var + (2 * math.pi * var).log()).sum(dim=(1, 2))

    def bits_per_dim(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """−log2 p(x | y) / N + log2(128), N = values per image: bits per 8-bit value.

        An 8-bit image v becomes x = (v + u)/128 − 1 with uniform dequantisation noise u in [0, 1)^N
        (`dequantize`). Then E_u[−log2 p(v + u)] ≥ −log2 P(v) (Jensen), and the change of variables from v + u to
        x adds log2(128) for each value. Give x already dequantised. With Gaussian noise instead of u, the figure
        is the density of noisy images on the 256-level scale: comparable between models of one noise level only.
        Returns (B,).
        """
        values = math.prod(self.config.image_shape)
        return -self.log_prob(x, y) / (values * math.log(2)) + math.log2(128)

    @torch.no_grad()
    def reverse(
        self,
        x: Tensor,
        y: Tensor | None = None,
        guidance: float = 0,
        guide_what: str = "ab",
        attn_temp: float = 1.0,
        annealed_guidance: bool = False,
        return_sequence: bool = False,
    ) -> Tensor | list[Tensor]:
        """The sampling pass, latents (B, T, D) to images (B, in_channels, H, W); ml-tarflow's signature.

        Under autocast it runs in autocast's dtype. The weights are packed anew at each call: to sample more than
        once, make a `Sampler`.
        """
        from .sampler import Sampler  # the convenience of a method; everything else points downwards

        kind = self.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return Sampler(self, dtype=dtype, solver="sequential").reverse(
            x, y, guidance, guide_what, attn_temp, annealed_guidance, return_sequence
        )


def dequantize(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """x = (v + u)/128 − 1, u uniform in [0, 1): 8-bit images (uint8, any shape) to fp32 in [-1, 1).

    u has 16 bits, so that v + u is exact in fp32 and ⌊128 (x + 1)⌋ gives v back.
    """
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        got = short(images.dtype) if isinstance(images, Tensor) else type(images).__name__
        raise ArgumentError("images", "a uint8 tensor", got)
    u = torch.randint(2**16, images.shape, generator=generator, device=images.device)
    return (images + u.to(torch.float32) / 2**16) / 128 - 1
