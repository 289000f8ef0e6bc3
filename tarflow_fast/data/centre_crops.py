"""Pictures as ml-tarflow prepares them for its statistics: torchvision's Resize, CenterCrop and RandomHorizontalFlip.

They differ from what `load_images` makes: the filter is bilinear, not bicubic; transparency and the orientation that a
camera has recorded are ignored; half of the pictures are mirrored; and where fp32 rounds down on the way to -1 … 1 and
back, the fraction that torchmetrics cuts off is all but a whole level.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator, Philox, SeedSequence
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..errors import DataError, first_line
from ..files import PathLike
from ..read_ahead import read_ahead
from .pictures import reading_pictures

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's


def find_below(path: PathLike) -> list[str]:
    """Returns all pictures in a folder and those below, in the order of their paths.

    Raises DataError where there are none.
    """
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"{str(root)!r}: no such folder")
    walked = os.walk(root, followlinks=True)
    found = sorted(os.path.join(folder, name) for folder, _, names in walked for name in names if _is_picture(name))
    if not found:
        raise DataError(f"{str(root)!r}: no pictures, which end in {', '.join(SUFFIXES)}")
    return found


def _is_picture(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _middle(path: str, size: int) -> Image.Image:
    """Returns the middle of a picture, whose shorter side is brought to that size. Raises DataError where it cannot."""
    try:
        with Image.open(path) as file:
            picture = file if file.mode == "RGB" else file.convert("RGB")
            width, height = picture.size
            short = min(width, height)
            across, down = (size if side == short else int(size * side / short) for side in (width, height))
            if (across, down) != picture.size:
                picture = picture.resize((across, down), Image.Resampling.BILINEAR)
            left, top = round((across - size) / 2), round((down - size) / 2)
            return picture.crop((left, top, left + size, top + size))
    except (OSError, ValueError, SyntaxError, Warning, Image.DecompressionBombError) as error:
        raise DataError(f"{path!r}: no picture that can be read ({first_line(error)})") from error


def centre_crop(path: str, size: int) -> NDArray[np.uint8]:
    """Returns the middle of a picture, (size, size, 3), whose shorter side is brought to that size.

    Raises DataError where it cannot be read.
    """
    return np.asarray(_middle(path, size))


@functools.cache
def levels() -> Tensor:
    """Returns what each of 256 levels is after the way to -1 … 1 and back, in fp32, its fraction cut off: (256,)
    uint8."""
    x = (torch.arange(256, dtype=torch.float32) / 255 - 0.5) / 0.5
    return (0.5 * (x + 1) * 255).byte()


def is_mirrored(i: int, seed: int) -> bool:
    """Returns whether picture i is mirrored, which depends on (seed, i) alone."""
    return bool(Generator(Philox(SeedSequence(entropy=seed, spawn_key=(i,)))).random() < 0.5)


def centre_crops(paths: Sequence[str], size: int, numbers: range, seed: int = 0) -> Iterator[NDArray[np.uint8]]:
    """Yields pictures (3, size, size), while those after them are read by as many threads as there are cores.

    Args:
        paths: All pictures.
        size: Pixels along a side.
        numbers: Those that are read.
        seed: The seed by which half of the pictures are mirrored.

    Raises:
        DataError: A picture cannot be read.
    """
    table = levels().tolist() * 3

    def read(i: int) -> NDArray[np.uint8]:
        pixels = np.asarray(_middle(paths[i], size).point(table))
        return (pixels[:, ::-1] if is_mirrored(i, seed) else pixels).transpose(2, 0, 1)

    with reading_pictures():
        yield from read_ahead(read, numbers)
