"""This module is TarFlow as plain as its equations (Zhai et al., arXiv 2412.06329): the oracle of the tests.

It is slow on purpose: it has no cache and no fused call, and one function serves both directions. All is computed and
returned in the dtype of the weights, up to float64, and is differentiable. `weights` is any TarFlow's state dict under
ml-tarflow's keys, and `k` the index of a flow block. Shapes: B batch, T tokens, D values per token, C width, K flow
blocks. Tokens are in the image's order unless "the block's order" is said: odd blocks read them backwards. Labels y:
(B,) int64, negative for no class, or None. Log-determinants are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]


class Density(NamedTuple):
    """A `Density` is the result of `density`.

    z: (B, T, D). outputs: z after each block, K of (B, T, D). log_det: (B,), log|det dz/dx|. token_log_det: (K, B, T),
    each block's share by token, in the block's order, −Σ_d xa.
    """

    z: Tensor
    outputs: list[Tensor]
    log_det: Tensor
    token_log_det: Tensor


class Inverse(NamedTuple):
    """An `Inverse` is the result of `inverse`.

    x: (B, T, D). sequence: the input z and what each block made of it, K + 1 of (B, T, D). log_det: (B,), log|det
    dx/dz|, the prior's scale included. token_log_det: (K, B, T), row k is block k's share by token, in the block's
    order, +Σ_d xa.
    """

    x: Tensor
    sequence: list[Tensor]
    log_det: Tensor
    token_log_det: Tensor


def patchify(images: Tensor, patch_size: int | tuple[int, int]) -> Tensor:
    """(B, ch, H, W) to (B, T, D): patches row by row, the values of one ordered (channel, row, column).

    patch_size: of a square patch, or its height and width.
    """
    B, ch, H, W = images.shape
    p, q = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    return images.reshape(B, ch, H // p, p, W // q, q).permute(0, 2, 4, 1, 3, 5).reshape(B, -1, ch * p * q)


def unpatchify(tokens: Tensor, patch_size: int | tuple[int, int], rows: int | None = None) -> Tensor:
    """(B, T, D) to images (B, ch, H, W); the inverse of patchify. rows: of patches, by default √T, as in a square."""
    B, T, D = tokens.shape
    p, q = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    n = math.isqrt(T) if rows is None else rows
    return tokens.reshape(B, n, T // n, D // (p * q), p, q).permute(0, 3, 1, 4, 2, 5).reshape(B, -1, n * p, T // n * q)


def num_blocks(weights: Weights) -> int:
    """Returns K, the number of flow blocks."""
    return sum(name.endswith(".proj_in.weight") for name in weights)


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    """Returns W x + b, by the weights under this name."""
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _layer_norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    """Returns LayerNorm of x, by the weights under this name."""
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-5)


def _attention(weights: Weights, name: str, x: Tensor, head_dim: int, temp: float) -> Tensor:
    """Returns the output projection of softmax(q kᵀ / (√d · temp), causal) v, for the stream x, (B, n, C) both."""
    n = x.shape[1]
    qkv = _linear(weights, f"{name}.qkv", _layer_norm(weights, f"{name}.norm", x))
    q, k, v = qkv.unflatten(-1, (3, -1, head_dim)).permute(2, 0, 3, 1, 4)  # each (B, H, n, d)
    logits = q @ k.transpose(-1, -2) / (math.sqrt(head_dim) * temp)
    future = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
    attended = logits.masked_fill(future, -math.inf).softmax(dim=-1) @ v
    return _linear(weights, f"{name}.proj", attended.transpose(1, 2).flatten(2))


def _mlp(weights: Weights, name: str, x: Tensor) -> Tensor:
    """Returns W₂ gelu(W₁ norm(x)), gelu(h) = h · ½(1 + erf(h / √2))."""
    h = _linear(weights, f"{name}.main.0", _layer_norm(weights, f"{name}.norm", x))
    return _linear(weights, f"{name}.main.2", h * 0.5 * (1 + torch.erf(h / math.sqrt(2))))


def class_embedding(weights: Weights, k: int, y: Tensor | None, batch: int) -> Tensor | float:
    """Returns the label's embedding, (B, 1, C), the mean of all where there is no class; 0 if unconditional."""
    table = weights.get(f"blocks.{k}.class_embed")
    if table is None:
        return 0.0
    mean = table.mean(dim=0)
    labels = [-1] * batch if y is None else y.tolist()
    return torch.stack([table[label] if label >= 0 else mean for label in labels])


def affine_parameters(
    weights: Weights, k: int, x: Tensor, y: Tensor | None, *, attn_temp: float = 1.0, head_dim: int = 64
) -> tuple[Tensor, Tensor]:
    """Returns (xa, xb)_i of block k, which transform token i + 1: a causal transformer's output at token i.

    x: (B, n, D), the first n ≤ T tokens in the block's order. attn_temp: what the attention logits are divided by.
    head_dim: d, the channels of one attention head. xa and xb are (B, n, D) each.
    """
    block = f"blocks.{k}"
    pos = weights[f"{block}.pos_embed"]
    pos = pos.flip(0) if k % 2 else pos
    embedding = class_embedding(weights, k, y, x.shape[0])
    h = _linear(weights, f"{block}.proj_in", x) + pos[: x.shape[1]] + embedding
    layer = 0
    while f"{block}.attn_blocks.{layer}.attention.qkv.weight" in weights:
        h = h + _attention(weights, f"{block}.attn_blocks.{layer}.attention", h, head_dim, attn_temp)
        h = h + _mlp(weights, f"{block}.attn_blocks.{layer}.mlp", h)
        layer += 1
    out = _linear(weights, f"{block}.proj_out", h)
    if out.shape[-1] == x.shape[-1]:  # volume-preserving
        return torch.zeros_like(out), out
    xa, xb = out.chunk(2, dim=-1)
    return xa, xb


def guided_parameters(
    weights: Weights,
    k: int,
    x: Tensor,
    y: Tensor | None,
    *,
    guidance: float = 0.0,
    guide_what: str = "ab",
    attn_temp: float = 1.0,
    annealed_guidance: bool = False,
    head_dim: int = 64,
) -> tuple[Tensor, Tensor]:
    """Returns xa_i + g_i (xa_i − xa_u_i), and the same for xb; u is the branch without class and with attn_temp.

    g_i = guidance, or guidance · (i + 1)/(T − 1) when annealed. guide_what: which of "a" (xa) and "b" (xb) are guided.
    The other arguments are those of `affine_parameters`.
    """
    xa, xb = affine_parameters(weights, k, x, y, head_dim=head_dim)
    if guidance == 0:
        return xa, xb
    xa_u, xb_u = affine_parameters(weights, k, x, None, attn_temp=attn_temp, head_dim=head_dim)
    g = torch.full((x.shape[1], 1), guidance, dtype=x.dtype, device=x.device)
    if annealed_guidance:
        T = weights[f"blocks.{k}.pos_embed"].shape[0]
        g = g * torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device)[:, None] / (T - 1)
    if "a" in guide_what:
        xa = xa + g * (xa - xa_u)
    if "b" in guide_what:
        xb = xb + g * (xb - xb_u)
    return xa, xb


def block_density(
    weights: Weights, k: int, x: Tensor, y: Tensor | None = None, *, head_dim: int = 64
) -> tuple[Tensor, Tensor]:
    """z_0 = x_0, z_{i+1} = (x_{i+1} − xb_i) · exp(−xa_i).

    x: (B, T, D). Returns z (B, T, D) and −Σ_d xa (B, T), the latter in the block's order.
    """
    x = x.to(weights[f"blocks.{k}.pos_embed"].dtype)
    x = x.flip(1) if k % 2 else x
    xa, xb = (F.pad(p[:, :-1], (0, 0, 1, 0)) for p in affine_parameters(weights, k, x, y, head_dim=head_dim))
    z = (x - xb) * torch.exp(-xa)
    return z.flip(1) if k % 2 else z, -xa.sum(dim=-1)


def block_inverse(
    weights: Weights, k: int, z: Tensor, y: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """x_0 = z_0, x_{i+1} = z_{i+1} · exp(xa_i) + xb_i, one token at a time, the whole prefix anew for each.

    z: (B, T, D). options: those of `guided_parameters`. Returns x (B, T, D) and Σ_d xa (B, T) in the block's order, of
    the guided xa if guided: the map stays triangular, so that this is its log-determinant too.
    """
    z = z.to(weights[f"blocks.{k}.pos_embed"].dtype)
    z = z.flip(1) if k % 2 else z
    x = z[:, :1]
    log_det = [torch.zeros_like(z[:, 0, 0])]
    for i in range(z.shape[1] - 1):
        xa, xb = guided_parameters(weights, k, x, y, **options)
        x = torch.cat([x, (z[:, i + 1] * torch.exp(xa[:, i]) + xb[:, i])[:, None]], dim=1)
        log_det.append(xa[:, i].sum(dim=-1))
    return x.flip(1) if k % 2 else x, torch.stack(log_det, dim=1)


def density(weights: Weights, x: Tensor, y: Tensor | None = None, *, head_dim: int = 64) -> Density:
    """Takes x to z through blocks 0 … K − 1; x: (B, T, D) tokens.

    ml-tarflow's forward gives log_det / (T·D) instead.
    """
    outputs, log_dets = [], []
    for k in range(num_blocks(weights)):
        x, log_det = block_density(weights, k, x, y, head_dim=head_dim)
        outputs.append(x)
        log_dets.append(log_det)
    token_log_det = torch.stack(log_dets)
    return Density(x, outputs, token_log_det.sum(dim=(0, 2)), token_log_det)


def inverse(weights: Weights, z: Tensor, y: Tensor | None = None, **options: Any) -> Inverse:
    """Takes z to x: scales by the prior's √var, then undoes blocks K − 1 … 0; z: (B, T, D), standard normal.

    options: those of `guided_parameters`. Without guidance, log N(z; 0, 1) − log_det = log_prob(x).
    """
    sequence, log_dets = [z.to(weights["var"].dtype)], []
    x = sequence[0] * weights["var"].sqrt()
    for k in reversed(range(num_blocks(weights))):
        x, log_det = block_inverse(weights, k, x, y, **options)
        sequence.append(x)
        log_dets.append(log_det)
    token_log_det = torch.stack(log_dets[::-1])
    prior = 0.5 * weights["var"].log().sum()
    return Inverse(x, sequence, token_log_det.sum(dim=(0, 2)) + prior, token_log_det)


def log_prob(weights: Weights, x: Tensor, y: Tensor | None = None, *, head_dim: int = 64) -> Tensor:
    """log p(x | y) = log N(z; 0, diag var) + log|det dz/dx|; x: (B, T, D) tokens. Returns (B,)."""
    result = density(weights, x, y, head_dim=head_dim)
    var = weights["var"]
    return result.log_det - 0.5 * (result.z**2 / var + torch.log(2 * math.pi * var)).sum(dim=(1, 2))


def denoise(
    weights: Weights,
    images: Tensor,
    y: Tensor | None = None,
    *,
    noise_std: float,
    scale: float = 1.0,
    patch_size: int | tuple[int, int] | None = None,
    head_dim: int = 64,
) -> Tensor:
    """x + scale · σ² ∇_x log p(x | y): Tweedie's estimate of the image under noise of std σ = noise_std.

    images: (B, ch, H, W), or tokens (B, T, D) as they are; patch_size: as in `patchify`, by default a square's. As
    published, p has the prior N(0, 1) here, also where a volume-preserving model has learnt another `var`.
    """
    if images.dim() == 4 and patch_size is None:
        patch_size = math.isqrt(weights["var"].shape[1] // images.shape[1])
    tokens = images if patch_size is None else patchify(images, patch_size)
    with torch.enable_grad():
        x = tokens.to(weights["var"].dtype).detach().requires_grad_()
        result = density(weights, x, y, head_dim=head_dim)
        log_p = result.log_det.sum() - 0.5 * (result.z**2).sum()
        (score,) = torch.autograd.grad(log_p, x)
    denoised = x.detach() + scale * noise_std**2 * score
    if patch_size is None:
        return denoised
    height = patch_size if isinstance(patch_size, int) else patch_size[0]
    return unpatchify(denoised, patch_size, images.shape[2] // height)


def spline_knots(
    parameters: Tensor,
    *,
    bins: int,
    low: float,
    high: float,
    soft_clip: float = 0.0,
    min_width: float = 0.0,
    min_height: float = 0.0,
    min_derivative: float = 0.0,
    divisor: float = 1.0,
    exponential: bool = False,
    tails: bool = True,
    ends: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns x and y of the knots of rational-quadratic splines, and the derivatives there, (..., bins + 1) each.

    parameters: (..., P), bins widths, bins heights, then derivatives: bins - 1 with tails, where the outer two are 1,
    else, or with ends, bins + 1. soft_clip: c, the parameters of derivatives are p / (1 + |p| / c), those of sizes
    p / (1 + 2|p| / c); 0 for p itself. min_width, min_height: the least share of the interval from low to high that a
    bin takes. min_derivative: what is added to the derivatives, which are exp(p) if exponential, else log(1 + exp(p));
    above 20 that is p itself, as torch has it. divisor: what the parameters of sizes are divided by.
    """

    def clipped(p: Tensor, c: float) -> Tensor:
        return p / (1 + p.abs() / c) if c else p

    def corners(p: Tensor, least: float) -> Tensor:
        sizes = (high - low) * (least + (1 - least * bins) * clipped(p / divisor, soft_clip / 2).softmax(-1))
        edges = [torch.full_like(p[..., 0], low)]
        for k in range(bins - 1):
            edges.append(edges[-1] + sizes[..., k])
        return torch.stack([*edges, torch.full_like(p[..., 0], high)], dim=-1)

    widths, heights, p = parameters.split([bins, bins, parameters.shape[-1] - 2 * bins], dim=-1)
    p = clipped(p, soft_clip)
    derivatives = min_derivative + (p.exp() if exponential else F.softplus(p))
    if tails and not ends:
        derivatives = F.pad(derivatives, (1, 1), value=1.0)
    return corners(widths, min_width), corners(heights, min_height), derivatives


def spline(x: Tensor, knots: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """y = y0 + h (s θ² + d0 θ (1 − θ)) / (s + (d0 + d1 − 2s) θ (1 − θ)) in each bin, θ = (x − x0) / w, s = h / w.

    Beyond the outer knots, y = x. x: (...). knots: those of `spline_knots`, for each x. Returns y and log dy/dx, (...)
    each (Durkan et al., arXiv 1906.04032, equations 4 and 5).
    """
    y, derivative = x, torch.ones_like(x)
    corners = [knot.unbind(-1) for knot in knots]
    for k in range(len(corners[0]) - 1):
        (x0, x1), (y0, y1), (d0, d1) = (knot[k : k + 2] for knot in corners)
        s = (y1 - y0) / (x1 - x0)
        theta = (x - x0) / (x1 - x0)
        both = theta * (1 - theta)
        bottom = s + (d0 + d1 - 2 * s) * both
        here = (x0 <= x) & (x <= x1)
        y = torch.where(here, y0 + (y1 - y0) * (s * theta**2 + d0 * both) / bottom, y)
        top = s**2 * (d1 * theta**2 + 2 * s * both + d0 * (1 - theta) ** 2)
        derivative = torch.where(here, top / bottom**2, derivative)
    return y, derivative.log()


def spline_inverse(y: Tensor, knots: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns x of y = spline(x), and log dx/dy, (...) each.

    The interval in which x lies is halved 120 times, which asks nothing of the spline but that it rises.
    """
    low, high = knots[0][..., 0].expand_as(y).clone(), knots[0][..., -1].expand_as(y).clone()
    for _ in range(120):
        middle = low + (high - low) / 2
        above = spline(middle, knots)[0] > y
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    inside = (knots[1][..., 0] <= y) & (y <= knots[1][..., -1])
    x = torch.where(inside, low + (high - low) / 2, y)
    return x, -spline(x, knots)[1]
