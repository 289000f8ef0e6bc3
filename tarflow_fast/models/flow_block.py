"""A flow block, as it is trained, is a causal transformer, and the affine transform that it determines.

Modules and state-dict keys are those of the published `ml-tarflow`. This is the differentiable density pass of one
block; its inverse lives in `engine/`.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import Flag, Labels, Number, check_count
from ..dtypes import residual_dtype
from ..engine.shape import BlockShape
from ..engine.weights import BlockWeights, LayerWeights
from ..errors import ArgumentError
from ..permutation import Permutation, check_permutation
from .affine_density import affine_density
from .attention import causal_attention
from .block_inverse import invert_block


def _norm(norm: nn.LayerNorm, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns LayerNorm of x, with statistics in the stream's dtype, in the given dtype of the weights that follow."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps).to(dtype)


class _Closed(nn.Module):
    """A `_Closed` module, once it is made, refuses attributes which it has no use for.

    A script that sets one expects another result of it, and would get the same as before. Subclasses outside this file
    may do as they please. fixed: attributes that the other passes, in C++ and of the sampler, know from the model's
    sizes, and which therefore keep their values.
    """

    fixed: ClassVar[tuple[str, ...]] = ()
    _closed: bool = False

    def __setattr__(self, name: str, value: Any) -> None:
        if self._closed and type(self).__module__ == __name__:
            if name in self.fixed and value != getattr(self, name):
                raise ArgumentError(name, f"{getattr(self, name)!r}, as the model was made", repr(value))
            known = name.startswith("_") or hasattr(self, name) or hasattr(type(self), name)
            if not known:
                expected = "an attribute that the module looks at (or a subclass, which may have others)"
                raise ArgumentError(f"{type(self).__name__}.{name}", expected, type(value).__name__)
        super().__setattr__(name, value)


class Attention(_Closed):
    """An `Attention` is causal self-attention with its norm and its two linear layers."""

    fixed = ("num_heads",)

    def __init__(self, channels: int, head_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, channels * 3)
        self.proj = nn.Linear(channels, channels)
        self.num_heads = channels // head_dim
        self.backend = "auto"
        self._closed = True

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Returns q, k and v of the tokens, each (B, T, H, d)."""
        qkv: Tensor = self.qkv(_norm(self.norm, x, self.qkv.weight.dtype))
        return qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(-3)

    def forward(self, x: Tensor, temp: float = 1.0) -> Tensor:
        """Returns what attention adds to the stream x, (B, T, C) both; temp: what the logits are divided by."""
        q, k, v = self._heads(x)
        q = q if temp == 1.0 else q / temp
        out: Tensor = self.proj(causal_attention(q, k, v, self.backend).flatten(-2))
        return out

    def step(self, x: Tensor, cache: list[tuple[Tensor, Tensor]], temp: float) -> Tensor:
        """Returns what `forward` does for one more token, x (B, 1, C), after those that the cache holds."""
        q, k, v = (heads.transpose(1, 2) for heads in self._heads(x))
        cache.append((k, v))
        keys, values = (torch.cat(part, dim=2) for part in zip(*cache, strict=True))
        attended = F.scaled_dot_product_attention(q, keys, values, scale=q.shape[-1] ** -0.5 / temp)
        out: Tensor = self.proj(attended.transpose(1, 2).flatten(-2))
        return out


class MLP(_Closed):
    """An `MLP` is a norm, and two linear layers with a GELU between them."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.main = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels))
        self._closed = True

    def forward(self, x: Tensor) -> Tensor:
        """Returns what the MLP adds to the stream x, (B, T, C) both."""
        dtype = next(self.main.parameters()).dtype
        out: Tensor = self.main(_norm(self.norm, x, dtype))
        return out


class AttentionBlock(_Closed):
    """An `AttentionBlock` is one pre-norm transformer layer on a residual stream in fp32."""

    def __init__(self, channels: int, head_dim: int, hidden: int):
        super().__init__()
        self.attention = Attention(channels, head_dim)
        self.mlp = MLP(channels, hidden)
        self._closed = True

    def forward(self, x: Tensor, temp: float = 1.0) -> Tensor:
        """Returns the stream x, (B, T, C), after the layer; temp: what the attention logits are divided by."""
        x = x + (self.attention(x) if temp == 1.0 else self.attention(x, temp))
        x = x + self.mlp(x)
        return x


class FlowBlock(_Closed):
    """A `FlowBlock` permutes tokens, then transforms token i+1 by what a causal transformer says after token i.

    The attributes and methods are those of ml-tarflow's `MetaBlock`. The order of tokens is fixed: assigning another
    `permutation` raises ArgumentError, as does an attribute that the block would not look at.

    shape: the sizes of the block. permutation: the order in which it reads the tokens.
    """

    attn_mask: Tensor
    fixed = ("shape", "nvp")

    def __init__(self, shape: BlockShape, permutation: Permutation):
        super().__init__()
        C, T, D = shape.channels, shape.tokens, shape.token_dim
        self.shape, self.nvp, self._permutation = shape, shape.affine, permutation
        self.proj_in = nn.Linear(D, C)
        self.pos_embed = nn.Parameter(torch.empty(T, C))
        self.class_embed = nn.Parameter(torch.empty(shape.classes, 1, C)) if shape.classes else None
        self.attn_blocks = nn.ModuleList([AttentionBlock(C, shape.head_dim, shape.hidden) for _ in range(shape.layers)])
        self.proj_out = nn.Linear(C, shape.parameters)
        # The mask is unused here (attention is causal by flag), and kept so that the state dict is ml-tarflow's.
        self.register_buffer("attn_mask", torch.ones(T, T))
        if not self.pos_embed.is_meta:  # a model without storage, for its shapes alone, needs no values
            self._initialise()
        self._steps: dict[str, list[list[tuple[Tensor, Tensor]]]] | None = None
        self._closed = True

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "permutation":
            check_permutation(value, self._permutation)
        else:
            super().__setattr__(name, value)

    @property
    def permutation(self) -> Permutation:
        """Returns the block's token order, a function (x, dim=1, inverse=False) that puts that dimension of x in it."""
        return self._permutation

    def weights(self) -> BlockWeights:
        """Returns the block as engines take it; tensors are shared with it unless they are reordered or averaged."""
        position, classes = self.pos_embed.detach(), None
        if self.class_embed is not None:
            embedding = self.class_embed.detach().squeeze(1)
            classes = torch.cat([embedding, embedding.mean(dim=0, keepdim=True)])
        return BlockWeights(
            shape=self.shape,
            proj_in_weight=self.proj_in.weight.detach(),
            proj_in_bias=self.proj_in.bias.detach(),
            position=self._permutation(position, dim=0),
            classes=classes,
            layers=tuple(layer_weights(layer) for layer in self.attn_blocks),
            proj_out_weight=self.proj_out.weight.detach(),
            proj_out_bias=self.proj_out.bias.detach(),
        )

    def _initialise(self) -> None:
        """Draws small embeddings, and sets the weight of the last layer to zero and the mask to the causal one."""
        for embedding in (self.pos_embed, self.class_embed):
            if embedding is not None:
                nn.init.normal_(embedding, std=1e-2)
        nn.init.zeros_(self.proj_out.weight)
        self.attn_mask.tril_()

    def _class_embedding(self, y: Tensor | None) -> Tensor | None:
        """Returns the label's embedding, or the mean of all for a label < 0: (B, 1, C), or (1, C) without labels."""
        if self.class_embed is None:
            return None
        mean = self.class_embed.mean(dim=0)
        if y is None:
            return mean
        return torch.where((y < 0).view(-1, 1, 1), mean, self.class_embed[y.clamp(min=0)])

    def transform(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z_0 = x_0, z_{i+1} = (x_{i+1} − xb_i) · exp(−xa_i), in the block's own token order.

        x: (B, T, D) float. y: (B,) int64, negative for no class, or None. Returns z (B, T, D) in x's token order and
        the log-det of each token, (B, T) in the block's order: −Σ_d xa in nats, 0 for the token that passes unchanged.
        Both are fp32 or wider.
        """
        x = x.to(residual_dtype(self.proj_in.weight.dtype))
        order = self._permutation
        out = self.transformer(order(x), y)
        if order.is_identity or order.is_reverse:  # the kernel reads such an order by itself
            return affine_density(out, x, self.nvp, order.is_reverse)
        z, log_det = affine_density(out, order(x), self.nvp)
        return order(z, inverse=True), log_det

    def transformer(self, x: Tensor, y: Tensor | None = None, attn_temp: float = 1.0) -> Tensor:
        """Returns (xa, xb) after each token, (B, T, 2D), or xb alone, (B, T, D), unless nvp.

        x: (B, T, D) in the block's own order, in the stream's dtype. y: (B,) int64, negative for no class, or None.
        attn_temp: what the attention logits are divided by.
        """
        dtype = self.proj_in.weight.dtype
        h = self.proj_in(x.to(dtype)).to(x.dtype) + self._permutation(self.pos_embed, dim=0)
        embedding = self._class_embedding(y)
        if embedding is not None:
            h = h + embedding
        for block in self.attn_blocks:
            h = block(h) if attn_temp == 1.0 else block(h, attn_temp)
        out: Tensor = self.proj_out(h.to(dtype))
        return out

    def reverse(
        self,
        x: Tensor,
        y: Labels = None,
        guidance: Number = 0,
        guide_what: str = "ab",
        attn_temp: Number = 1.0,
        annealed_guidance: Flag = False,
    ) -> Tensor:
        """Returns the inverse of `forward`, (B, T, D), of latents x, (B, T, D), which are not mutated.

        The arguments are ml-tarflow's, and are described at `TarFlow.reverse`. The weights are packed anew at each
        call, and x.shape[1] tokens made one after the other: a `Sampler` makes images of latents through all blocks,
        and packs once.
        """
        return invert_block(self, x, y, guidance, guide_what, attn_temp, annealed_guidance)

    def set_sample_mode(self, flag: Flag = True) -> None:
        """Empties the keys and values that `reverse_step` gathers, and sets whether it is to gather any."""
        layers = range(len(self.attn_blocks))
        self._steps = {branch: [[] for _ in layers] for branch in ("cond", "uncond")} if flag else None

    def reverse_step(
        self,
        x: Tensor,
        pos_embed: Tensor,
        i: int,
        y: Tensor | None = None,
        attn_temp: float = 1.0,
        which_cache: str = "cond",
    ) -> tuple[Tensor, Tensor]:
        """Returns (xa, xb) that transform token i + 1, (B, 1, D) each, in the block's own order, as in ml-tarflow.

        It is for loops over tokens that people write: `set_sample_mode(True)`, then i = 0, 1, … in turn for each cache.

        x: (B, T, D) and pos_embed: (T, C), both as `permutation` gives them. i: the token before the one that is
        transformed. y: (B,) int64, negative for no class, or None. attn_temp: what the attention logits are divided by.
        which_cache: "cond" or "uncond". Raises ArgumentError for another cache or token, or without
        `set_sample_mode(True)`.
        """
        if self._steps is None or which_cache not in self._steps:
            raise ArgumentError("which_cache", "'cond' or 'uncond', after set_sample_mode(True)", repr(which_cache))
        i = check_count("i", i, 0, self.shape.tokens - 1)
        dtype = self.proj_in.weight.dtype
        stream = residual_dtype(dtype)
        h = self.proj_in(x[:, i : i + 1].to(dtype)).to(stream) + pos_embed[i : i + 1]
        embedding = self._class_embedding(y)
        if embedding is not None:
            h = h + embedding
        layer: Any
        for layer, cache in zip(self.attn_blocks, self._steps[which_cache], strict=True):
            h = h + layer.attention.step(h, cache, attn_temp)
            h = h + layer.mlp(h)
        out: Tensor = self.proj_out(h.to(dtype)).to(stream)
        if not self.nvp:
            return torch.zeros_like(out), out
        xa, xb = out.chunk(2, dim=-1)
        return xa, xb

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns z (B, T, D) as `transform`, and the log-det as a mean over all T·D values, (B,), as in ml-tarflow."""
        z, log_det = self.transform(x, y)
        return z, log_det.sum(1) / (x.shape[1] * x.shape[2])


def layer_weights(layer: Any) -> LayerWeights:
    """Returns the twelve tensors of an `AttentionBlock`, which are shared with it."""
    attention, mlp = layer.attention, layer.mlp
    modules = (attention.norm, attention.qkv, attention.proj, mlp.norm, mlp.main[0], mlp.main[2])
    tensors = (tensor.detach() for module in modules for tensor in (module.weight, module.bias))
    return LayerWeights(**dict(zip((field.name for field in fields(LayerWeights)), tensors, strict=True)))


PLAIN = (FlowBlock, AttentionBlock, Attention, MLP, nn.Linear, nn.LayerNorm, nn.GELU, nn.Sequential, nn.ModuleList)
"""These are the modules whose arithmetic the C++ pass and the engines know. A subclass may compute something else."""


def unknown_arithmetic(blocks: nn.ModuleList) -> str | None:
    """Returns why these blocks may compute something else than their weights and sizes say, or None if they do not."""
    for module in blocks.modules():
        name = type(module).__name__
        if type(module) not in PLAIN:
            return f"it does not know what a {name} computes"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"a {name} has forward hooks, which it would not call"
        if "forward" in module.__dict__ or "transform" in module.__dict__:
            return f"a {name} has another forward pass than its class"
    return None
