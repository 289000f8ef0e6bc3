"""Sampling: latents to images through the flow blocks of a model, batch by batch."""

from .report import Report, Samples
from .sampler import Sampler

__all__ = ["Report", "Sampler", "Samples"]
