"""This package makes samplers for the models of other libraries, one file for each library."""

from .dispatch import accelerate

__all__ = ["accelerate"]
