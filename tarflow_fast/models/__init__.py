"""The models, one file an architecture, and what is particular to them."""

from .config import TarFlowConfig
from .denoising import denoise
from .density import dequantize
from .tarflow import TarFlow

__all__ = ["TarFlow", "TarFlowConfig", "denoise", "dequantize"]
