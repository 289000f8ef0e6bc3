"""The fixed point x = h(x) of a contraction, by iteration with a stated residual, and Anderson acceleration."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

TOLERANCE = 4.0  # units of rounding, below which no residual can be brought


class FixedPoint(NamedTuple):
    """A fixed point that was found.

    x: (B, …). passes: how often h was evaluated. residual: max over the batch of |h(x') − x'|₂, of the point x' from
    which x = h(x') comes, so that x is within L / (1 − L) · residual of the exact one.
    """

    x: Tensor
    passes: int
    residual: float


def fixed_point(h: Callable[[Tensor], Tensor], start: Tensor, lipschitz: float, memory: int) -> FixedPoint:
    """Returns the fixed point of a contraction h, to rounding or after twice the passes that the plain iteration takes.

    With a memory of m, the next point is that combination of the last m whose residuals cancel best (Walker and Ni,
    2011), separately for each sample. Where that made a sample's residual larger, its next point is h of the best so
    far, which for a contraction is closer, so that the iteration converges with any memory.

    start: (B, …), the first point. lipschitz: L < 1, h's constant. memory: m; 0 for the plain iteration x ← h(x).
    """
    x, shape = start.flatten(1), start.shape
    eps = torch.finfo(x.dtype).eps
    most = 20 + int(2 * math.log(eps) / math.log(lipschitz))
    best_image, best = x, x.new_full((len(x),), torch.inf)
    before = best > 0
    points: list[tuple[Tensor, Tensor]] = []  # images and residuals of the last points, (B, D) each
    passes = 0
    while passes < most:
        passes += 1
        image = h(x.reshape(shape)).flatten(1)
        residual = image - x
        size = residual.norm(dim=1)
        better = size < best
        best_image = torch.where(better[:, None], image, best_image)
        best = torch.where(better, size, best)
        # A point that h made of the best has a smaller residual, unless it is all rounding.
        done = (best <= TOLERANCE * eps * (1 + best_image.norm(dim=1))) | ~(better | before)
        before = better
        if bool(done.all()) or not bool(size.isfinite().all()):
            break
        points = [*points, (image, residual)][-memory - 1 :]
        x = torch.where(better[:, None], _combined(points), best_image) if memory else image
    return FixedPoint(best_image.reshape(shape), passes, float(best.max()))


def _combined(points: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Returns G − ΔG γ for the γ that makes |f − ΔF γ| least, (B, D).

    points: the image G and the residual f of the last points; Δ are differences of one to the next.
    """
    image, residual = points[-1]
    if len(points) == 1:
        return image
    images, residuals = (torch.stack(each, -1).diff(dim=-1) for each in zip(*points, strict=True))  # (B, D, m)
    gram = residuals.mT @ residuals
    ridge = torch.finfo(gram.dtype).eps * gram.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None]
    eye = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
    tiny = torch.finfo(gram.dtype).tiny
    gamma = torch.linalg.solve(gram + (ridge + tiny) * eye, residuals.mT @ residual[..., None])
    return image - (images @ gamma)[..., 0]
