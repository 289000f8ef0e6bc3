"""The features of images, from one pass of a network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArgumentError


def check_features(name: str, features: Tensor, low: int) -> Tensor:
    """Returns features (n, d), of which there are at least `low`. Raises ArgumentError for others."""
    if features.dim() != 2 or len(features) < low:
        raise ArgumentError(name, f"shape (n, d), n >= {low}", tuple(features.shape))
    if not torch.isfinite(features).all():
        raise ArgumentError(name, "finite values", "infinities or NaNs")
    return features


@dataclass(frozen=True)
class Features:
    """A `Features` holds what Inception-v3 makes of B images.

    Attributes:
        pooled: (B, 2048) fp32, the pooled layer, of which FID, KID, precision and recall are.
        spatial: (B, 2023) fp32, seven channels of a layer of 17×17 places, channels last, of which sFID is.
        logits: (B, 1008) fp32, those of its classes without their bias, of which the Inception score is.
    """

    pooled: Tensor
    spatial: Tensor
    logits: Tensor

    def __len__(self) -> int:
        return len(self.pooled)
