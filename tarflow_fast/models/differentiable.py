"""The inverse has gradients here, for training through samples.

The pass itself is an engine's, and records nothing. Its result x of one block is the fixed point of a parallel pass,

    x = F(x, z, θ),    F_0 = z_0,    F_{i+1} = z_{i+1} · exp(xa_i(x_{≤i}; θ)) + xb_i(x_{≤i}; θ),

so that the gradient g of a loss with respect to x becomes λ = g + (∂F/∂x)ᵀ λ, and those of z and θ are (∂F/∂z)ᵀ λ and
(∂F/∂θ)ᵀ λ. ∂F/∂x is strictly triangular: λ = Σ_n ((∂F/∂x)ᵀ)ⁿ g ends after at most T − 1 backward passes through one and
the same recorded forward pass, and in most blocks long before, when what a pass adds is lost in rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dtypes import residual_dtype
from ..engine import Condition, Guidance
from ..errors import ArgumentError
from ..sampling.sampler import Sampler
from .flow_block import FlowBlock


def parallel_pass(block: FlowBlock, x: Tensor, z: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
    """Returns F(x, z), (B, T, D), and the log-det of each token, (B, T), Σ_d xa; all is in the block's own order."""
    guidance, labels = condition.guidance, condition.labels
    out = block.transformer(x, labels).to(x.dtype)[:, :-1]
    if guidance.active:
        unguided = block.transformer(x, None, guidance.attn_temp).to(x.dtype)[:, :-1]
        scale = torch.tensor(guidance.schedule(x.shape[1]), dtype=x.dtype, device="cpu").to(x.device).view(-1, 1)
        guided = out + scale * (out - unguided)
        D = x.shape[2]
        if block.nvp:
            a, b = (guided if part in guidance.what else out for part in "ab")
            out = torch.cat([a[..., :D], b[..., D:]], dim=-1)
        else:
            out = guided if "b" in guidance.what else out
    if not block.nvp:
        return torch.cat([z[:, :1], z[:, 1:] + out], dim=1), x.new_zeros(x.shape[:2])
    xa, xb = out.chunk(2, dim=-1)
    new = torch.cat([z[:, :1], z[:, 1:] * xa.exp() + xb], dim=1)
    return new, torch.nn.functional.pad(xa.sum(-1), (1, 0))


class _Invert(torch.autograd.Function):
    """An `_Invert` makes x (B, T, D) and its token log-dets (B, T) of z; gradients go to z and the parameters."""

    @staticmethod
    def forward(ctx: Any, invert: Any, block: FlowBlock, condition: Condition, z: Tensor, *parameters: Tensor) -> Any:
        x, token_log_det = invert(z, condition)
        ctx.block, ctx.condition = block, condition
        ctx.save_for_backward(x, z, *parameters)
        return x, token_log_det

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, grad_log_det: Tensor) -> Any:
        with torch.autocast(grad_x.device.type, enabled=False), torch.no_grad():  # the caller's modes have no part here
            found = _gradients(ctx, grad_x, grad_log_det)
        if not torch.is_grad_enabled():  # create_graph=True enables it
            return found
        anchor = torch.zeros((), device="cpu", requires_grad=True)
        return tuple(None if each is None else _Once.apply(anchor, each) for each in found)


class _Once(torch.autograd.Function):
    """A `_Once` is a gradient that has none itself."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise ArgumentError(
            "differentiable", "first derivatives of a reverse, which are all that it has", "second ones"
        )


def _gradients(ctx: Any, grad_x: Tensor, grad_log_det: Tensor) -> Any:
    """Returns the gradients of z and the parameters, in the places of `_Invert.forward`'s arguments."""
    x, z, *parameters = ctx.saved_tensors  # this raises if a parameter has been changed meanwhile
    x, z = x.detach().requires_grad_(), z.detach().requires_grad_()
    with torch.enable_grad():
        new, log_det = parallel_pass(ctx.block, x, z, ctx.condition)
    term = grad_x
    if log_det.requires_grad:
        (through,) = torch.autograd.grad(log_det, x, grad_log_det, retain_graph=True)
        term = term + through
    adjoint, eps = term, torch.finfo(x.dtype).eps
    for _ in range(x.shape[1] - 1):
        (term,) = torch.autograd.grad(new, x, term, retain_graph=True)
        adjoint = adjoint + term
        if bool(term.abs().amax() <= eps * adjoint.abs().amax()):
            break
    wanted = [z, *(p for p in parameters if p.requires_grad)]
    outputs = ([new, log_det], [adjoint, grad_log_det]) if log_det.requires_grad else ([new], [adjoint])
    found = iter(torch.autograd.grad(*outputs[:1], wanted, outputs[1], allow_unused=True))
    grad_z = next(found)
    return None, None, None, grad_z, *(next(found) if p.requires_grad else None for p in parameters)


def differentiable_reverse(
    model: Any, x: Tensor, labels: Tensor | None, guidance: Guidance, sampler: Sampler
) -> tuple[list[Tensor], Tensor]:
    """Returns the tokens that go into the blocks and come out of each, K + 1 of (B, T, D), and log|det dx/dz| (B,).

    model: a TarFlow. x: (B, T, D) float latents on the model's device. labels: (B,) int64, or None.
    sampler: a sampler made of the model, whose engines run the pass.
    """
    condition = Condition(labels, guidance)
    std = model.var.to(residual_dtype(model.dtype)).sqrt()
    tokens = [x.to(std.dtype), x.to(std.dtype) * std]
    log_det = std.log().sum().expand(x.shape[0])
    for k in reversed(range(len(model.blocks))):
        block: FlowBlock = model.blocks[k]
        z = block.permutation(tokens[-1])

        def invert(z: Tensor, condition: Condition, k: int = k) -> tuple[Tensor, Tensor]:
            return sampler.invert_block(k, z, condition)

        out, token_log_det = _Invert.apply(invert, block, condition, z, *block.parameters())
        tokens.append(block.permutation(out, inverse=True))
        log_det = log_det + token_log_det.sum(1)
    return [tokens[0], *tokens[2:]], log_det
