"""This package holds the models, one file for each architecture, and what is particular to them."""

from .config import TarFlowConfig
from .denoising import denoise
from .pixels import dequantize
from .tarflow import TarFlow

__all__ = ["TarFlow", "TarFlowConfig", "denoise", "dequantize"]
