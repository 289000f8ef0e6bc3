"""The random parts of a residual flow's estimates: how many terms of a series are taken, and probes of traces."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def roulette(terms: int, q: float, generator: torch.Generator | None) -> list[float]:
    """Returns c_k = 1 / P(N ≥ k) for k = 1 … N, where N − terms is geometric: P(N ≥ terms + j) = q^j.

    Σ_{k ≤ N} c_k a_k then has the mean Σ a_k. Its variance is finite if |a_k| ≤ L^k and L² < q.
    """
    u = 1 - torch.rand((), generator=generator, dtype=torch.float64, device=generator.device if generator else None)
    more = int(math.log(float(u)) / math.log(q))
    return [q ** -max(k - terms, 0) for k in range(1, terms + more + 1)]


def signs(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Returns values of −1 and 1, each with probability 1/2 (Rademacher), of the shape, dtype and device of `like`."""
    device = generator.device if generator else like.device
    bits = torch.randint(0, 2, like.shape, generator=generator, device=device)
    return (2 * bits - 1).to(like.device, like.dtype)
