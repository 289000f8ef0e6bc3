"""`train(TrainConfig(...))` trains a TarFlow."""

from __future__ import annotations

from .config import TrainConfig
from .loop import train
from .start import read_init, sizes_of
from .state import CHECKPOINT, continued

__all__ = ["CHECKPOINT", "TrainConfig", "continued", "read_init", "sizes_of", "train"]
