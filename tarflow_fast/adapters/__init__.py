"""Samplers for the models of other libraries, one file a library."""

from .ml_tarflow import accelerate

__all__ = ["accelerate"]
