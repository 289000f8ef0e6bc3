"""Training: `train(TrainConfig(...))`."""

from __future__ import annotations

from .config import TrainConfig
from .loop import train

__all__ = ["TrainConfig", "train"]
