"""Pictures as ml-tarflow prepares them for its statistics: torchvision's Resize, CenterCrop and RandomHorizontalFlip.

They differ from what `load_images` makes: the filter is bilinear, not bicubic; transparency and the orientation that a
camera has recorded are ignored; half of the pictures are mirrored; and where fp32 rounds down on the way to -1 … 1 and
back, the fraction that torchmetrics cuts off is all but a whole level.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator, Philox, SeedSequence
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..errors import DataError, first_line
from ..files import PathLike
from .load import cores
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


def centre_crop(path: str, size: int) -> NDArray[np.uint8]:
    """Returns the middle of a picture, (size, size, 3), whose shorter side is brought to that size.

    Raises DataError where it cannot be read.
    """
    try:
        with Image.open(path) as file:
            picture = file.convert("RGB")
            width, height = picture.size
            short = min(width, height)
            across, down = (size if side == short else int(size * side / short) for side in (width, height))
            if (across, down) != picture.size:
                picture = picture.resize((across, down), Image.Resampling.BILINEAR)
    except (OSError, ValueError, SyntaxError, Warning, Image.DecompressionBombError) as error:
        raise DataError(f"{path!r}: no picture that can be read ({first_line(error)})") from error
    left, top = round((across - size) / 2), round((down - size) / 2)
    return np.asarray(picture)[top : top + size, left : left + size]


def levels() -> Tensor:
    """Returns what each of 256 levels is after the way to -1 … 1 and back, in fp32, its fraction cut off: (256,)
    uint8."""
    x = (torch.arange(256, dtype=torch.float32) / 255 - 0.5) / 0.5
    return (0.5 * (x + 1) * 255).byte()


def centre_crops(paths: Sequence[str], size: int, batch_size: int, seed: int = 0) -> Iterator[Tensor]:
    """Yields pictures (B, 3, size, size) uint8, while the next batch is read by as many threads as there are cores.

    Args:
        paths: The pictures.
        size: Pixels along a side.
        batch_size: The number of pictures in a batch; the last one may have fewer.
        seed: The seed by which picture i is mirrored or not; that depends on (seed, i) alone.

    Raises:
        DataError: A picture cannot be read.
    """
    table = levels().numpy()

    def read(i: int) -> NDArray[np.uint8]:
        pixels = table[centre_crop(paths[i], size)]
        mirrored = Generator(Philox(SeedSequence(entropy=seed, spawn_key=(i,)))).random() < 0.5
        return (pixels[:, ::-1] if mirrored else pixels).transpose(2, 0, 1)

    starts = range(0, len(paths), batch_size)
    with reading_pictures(), ThreadPoolExecutor(cores()) as pool:
        parts = [pool.map(read, range(start, min(start + batch_size, len(paths)))) for start in starts[:1]]
        for start in starts:
            ahead = range(start + batch_size, min(start + 2 * batch_size, len(paths)))
            parts.append(pool.map(read, ahead))
            yield torch.from_numpy(np.stack(list(parts.pop(0))))
