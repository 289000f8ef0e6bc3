"""This module has the absolute tolerances of all tests in one table, so that none is loosened in a corner."""

from __future__ import annotations

import torch
from torch import Tensor

# fp32 after all blocks against what the published code returned in fp32.
GOLDEN = 2e-4

# float64 laws: |inverse(density(x)) − x|, and log-det against the Jacobian's.
INVERSE_F64 = 1e-9
LOG_DET_F64 = 1e-8

# float64: one thing computed in two ways.
SAME_F64 = 1e-10

# fp32: one thing computed in two ways, of values of about 1 (larger ones: as much larger).
SAME_F32 = 1e-5

# fp32: a row of a batch against the same row alone or in another batch.
BATCH = 1e-4

# Families of flows: ∫ p over the plane against 1; log-det against the Jacobian's in float64; the inverse of forward in
# fp32.
FAMILY_INTEGRAL = 0.01
FAMILY_LOG_DET = 1e-6
FAMILY_INVERSE = 1e-5

# How many standard errors a random figure may be off.
STANDARD_ERRORS = 4.5

# bf16 and fp16: what an error may be beside twice that of the same expression in PyTorch, in units of the
# dtype's resolution at the size of the result: ½ is one rounding.
HALF_FLOOR = 0.5

# bf16 on trained weights against fp32: the median sample's mean |difference|, on the scale -1 to 1, and the relative
# difference of bits/dim. What is promised is 0.02 and 0.01.
BF16_IMAGE = 0.005
BF16_BITS = 0.001

# What bf16 keys and values are smaller or larger by than fp32's, relative, summed over some ten thousand.
BF16_BIAS = 2e-4


def max_error(got: Tensor, wanted: Tensor) -> float:
    """Returns the largest absolute difference, in float64; shapes must agree and nothing may be NaN."""
    assert got.shape == wanted.shape, f"{tuple(got.shape)} against {tuple(wanted.shape)}"
    error = (got.detach().double().cpu() - wanted.detach().double().cpu()).abs().max().item()
    assert error == error, "a NaN"
    return error


def assert_close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    error = max_error(got, wanted)
    assert error <= tolerance, f"largest error {error:.3g}, allowed {tolerance:.3g}"


def error_budget(expression: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """Returns what a bf16 or fp16 result may be off: 2 · |expression − exact| + floor.

    expression: the same thing computed by a plain PyTorch expression in `dtype`; exact: by the reference in
    fp32 or float64. The floor is HALF_FLOOR · eps(dtype) · max|exact|.
    """
    floor = HALF_FLOOR * torch.finfo(dtype).eps * exact.abs().max().item()
    return 2 * max_error(expression, exact) + floor
