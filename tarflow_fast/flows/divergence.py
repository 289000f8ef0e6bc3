"""The divergence ∇·v = tr(dv/dx) of a velocity v(x): exact, or Hutchinson's estimate of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Noise = Literal["rademacher", "gaussian"]


def with_divergence(
    velocity: Callable[[Tensor], Tensor], x: Tensor, probe: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns v(x), (B, …), and its divergence, (B,): tr(dv/dx), or Hutchinson's estimate εᵀ(dv/dx)ε.

    The exact trace takes as many backward passes as a sample has values; the estimate takes one (Hutchinson, 1990;
    Grathwohl et al., 2019, arXiv 1810.01367). Both can be differentiated again where gradients are enabled.

    Args:
        velocity: The function of x, which treats samples separately.
        x: (B, …) floating-point, where it is evaluated.
        probe: (B, …) ε, noise with mean 0 and covariance I, which stays the same along one solution of an ODE; None for
            the exact trace.
    """
    record = torch.is_grad_enabled()
    with torch.enable_grad():
        # Without a record x may be a view that requires a gradient and has no history, as the adjoint method's are.
        x = x if record and x.requires_grad else x.detach().requires_grad_()
        v = velocity(x)

        def product(direction: Tensor, last: bool) -> Tensor:  # directionᵀ (dv/dx)
            (g,) = torch.autograd.grad(v, x, direction, create_graph=record, retain_graph=record or not last)
            return g

        if probe is not None:
            trace = (product(probe, last=True) * probe).flatten(1).sum(1)
        else:
            dims = v[0].numel()
            unit = torch.eye(dims, dtype=v.dtype, device=v.device)
            trace = sum(
                (
                    product(unit[i].expand(len(v), dims).reshape(v.shape), i == dims - 1).flatten(1)[:, i]
                    for i in range(dims)
                ),
                start=v.new_zeros(len(v)),
            )
    return (v, trace) if record else (v.detach(), trace.detach())


def draw_probe(x: Tensor, noise: Noise, generator: torch.Generator | None = None) -> Tensor:
    """Returns noise ε with mean 0 and covariance I, in the shape, dtype and device of x.

    noise: "rademacher" for ±1 with equal odds, whose estimate varies least; "gaussian" for N(0, 1).
    """
    if noise == "gaussian":
        return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    signs = torch.randint(0, 2, x.shape, generator=generator, device=x.device)
    return signs.to(x.dtype) * 2 - 1
