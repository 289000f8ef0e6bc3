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
from typing import Any

import numpy as np
import torch
from numpy.random import Philox, SeedSequence
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..errors import DataError, first_line
from ..files import PathLike
from ..read_ahead import read_ahead
from .pictures import check_is_file, read_pictures, reading_pictures
from .png import in_a_task

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


def centre_crop(path: str, size: int) -> NDArray[np.uint8]:
    """Returns the middle of a picture, (3, size, size), whose shorter side is brought to that size.

    Raises DataError where it cannot be read.
    """
    try:
        check_is_file(path)
        with Image.open(path) as file:
            picture = file if file.mode == "RGB" else file.convert("RGB")
            width, height = picture.size
            short = min(width, height)
            across, down = (size if side == short else int(size * side / short) for side in (width, height))
            if (across, down) != picture.size:
                picture = picture.resize((across, down), Image.Resampling.BILINEAR)
            left, top = round((across - size) / 2), round((down - size) / 2)
            return np.asarray(picture.crop((left, top, left + size, top + size))).transpose(2, 0, 1)
    except (OSError, ValueError, SyntaxError, Warning, Image.DecompressionBombError) as error:
        raise DataError(f"{path!r}: no picture that can be read ({first_line(error)})") from error


@functools.cache
def levels() -> Tensor:
    """Returns what each of 256 levels is after the way to -1 … 1 and back, in fp32, its fraction cut off: (256,)
    uint8."""
    x = (torch.arange(256, dtype=torch.float32) / 255 - 0.5) / 0.5
    return (0.5 * (x + 1) * 255).byte()


def are_mirrored(numbers: range, seed: int) -> NDArray[np.bool_]:
    """Returns which pictures are mirrored: picture i by the first of the four numbers that block i of a stream holds,
    so that it depends on (seed, i) alone."""
    stream: Any = Philox(SeedSequence(seed)).advance(numbers.start)
    return stream.random_raw(4 * len(numbers))[::4] < 2**63


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
    table = bytes(levels().tolist())

    def crop(path: str, out: NDArray[np.uint8]) -> None:
        out[:] = centre_crop(path, size)

    def some(part: range) -> Iterator[NDArray[np.uint8]]:
        pictures = read_pictures(paths[part.start : part.stop], np.empty((len(part), 3, size, size), np.uint8), crop)
        for picture, mirrored in zip(pictures, are_mirrored(part, seed), strict=True):
            made = np.frombuffer(bytearray(picture).translate(table), np.uint8).reshape(picture.shape)
            yield made[..., ::-1] if mirrored else made

    with reading_pictures():
        yield from read_ahead(some, numbers, in_a_task(3 * size**2))
