"""Every family of normalizing flow under one interface: `build("glow", data_shape=(1, 28, 28))` makes a model.

`tarflow_fast.flows.FAMILIES` lists the families; `FamilyFlow` is what all of them are.
"""

from __future__ import annotations

from .base import Bijection, FamilyFlow
from .checkpoints import describe, is_family, load, save
from .pictures import draw_picture
from .preprocessing import Preprocessed
from .registry import FAMILIES, Family, build

__all__ = [
    "FAMILIES",
    "Bijection",
    "Family",
    "FamilyFlow",
    "Preprocessed",
    "build",
    "describe",
    "draw_picture",
    "is_family",
    "load",
    "save",
]
