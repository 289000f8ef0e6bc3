"""Plain PNGs are read by native code, many in one call that leaves Python's lock to other threads.

Plain are 8 bits of grey or RGB without interlacing, animation, transparency, text or EXIF. Whatever is odd about a file
leaves it to Pillow, which reads or refuses it; so are all files where the native module was not built.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray

from ..native import address

NATIVE: ModuleType | None
try:
    NATIVE = import_module("tarflow_fast._png")
except ImportError:
    NATIVE = None

FEWEST, MOST, PIXEL_BYTES = 4, 64, 2**18  # a task of one small picture would cost as much as the picture


def in_a_task(nbytes: int) -> int:
    """Returns how many pictures are read in one task. nbytes: the bytes of pixels of each, (ch, H, W) uint8."""
    return max(FEWEST, min(PIXEL_BYTES // nbytes, MOST))


def read_plain_pngs(paths: Sequence[str], out: NDArray[np.uint8]) -> list[bool]:
    """Reads plain PNGs of H×W pixels into `out`, and returns which of the files are such.

    For the others `out` holds anything. A grey file fills three channels too. paths: the N files; those are looked at
    that are named .png, as others would be read twice. out: contiguous, (N, channels, H, W), channels: 1 or 3.
    """
    if NATIVE is None:
        return [False] * len(paths)
    named = [os.fsencode(path) if path.lower().endswith(".png") else b"" for path in paths]
    channels, height, width = out.shape[1:]
    sizes = {"height": height, "width": width, "channels": channels}
    target = address("out", torch.from_numpy(out), torch.uint8, count=len(paths) * height * width * channels)
    done: list[bool] = NATIVE.read(paths=named, **sizes, out=target)
    return done
