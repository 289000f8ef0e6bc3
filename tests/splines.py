"""This module has the splines that tests share: their laws, and parameters from tame to extreme."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tarflow_fast.spline import SplineLaw

LAWS = {
    "zuko": SplineLaw.zuko(8),
    "zuko, steep": SplineLaw.zuko(5, bound=2.0, slope=1e-4),
    "nflows": SplineLaw.nflows(10, 3.0),
    "nflows, divided": SplineLaw.nflows(4, 0.7, divisor=6.0),
    "nflows, no tails": SplineLaw.nflows(6, None),
    "normflows, one bin": SplineLaw.normflows(1),
    "circular": replace(SplineLaw.normflows(5), ends=True),
}
NO_LEAST_SIZE = SplineLaw.nflows(5, 2.0, min_bin_width=0.0, min_bin_height=0.0, min_derivative=0.0)
"""A law under which extreme parameters make bins that are narrower than the rounding of their ends."""


def random_splines(
    law: SplineLaw, n: int, spread: float, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Returns parameters (n, P) with this standard deviation, and values (n,) in the interval, with some at its ends.

    Where the law has tails, a few values lie outside.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = torch.randn(n, law.parameters, generator=generator, dtype=torch.float64) * spread
    value = law.low + (law.high - law.low) * torch.rand(n, generator=generator, dtype=torch.float64)
    value[:2] = torch.tensor([law.low, law.high])
    if law.tails:
        value[2:4] = torch.tensor([law.low - 1, law.high * 3])
    return parameters.to(dtype), value.to(dtype)
