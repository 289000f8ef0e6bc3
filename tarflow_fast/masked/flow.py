"""A flow of masked autoregressive transforms and fixed steps."""

from __future__ import annotations

from dataclasses import dataclass

from .fixed import Fixed
from .transform import MaskedTransform

Step = MaskedTransform | Fixed


@dataclass(frozen=True)
class MaskedFlow:
    """A flow, from data x to latents z, without its base distribution, which stays with the library it is of.

    Attributes:
        features: D, the number of dimensions.
        steps: The steps in the order in which data go through them; sampling goes the other way.
    """

    features: int
    steps: tuple[Step, ...]
