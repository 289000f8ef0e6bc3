"""The dtypes that a model is computed in."""

from __future__ import annotations

import torch


def residual_dtype(weight_dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of the residual stream, norms, exp and log-det: fp32, or fp64 for a float64 model."""
    return torch.float64 if weight_dtype == torch.float64 else torch.float32
