"""Images are read from wherever they are, from any number on and no more at once than a pass takes.

What can be wrong with a path is told when a source is made: the network that makes features is loaded after that.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data import centre_crops, find_below, load_images, open_pictures
from ..errors import ArgumentError, TarFlowWarning
from ..files import PathLike
from ..limits import MOST_SIZE
from ..sampling.sharded import ShardImages, is_run
from ..sizes import Size, checked_size


@dataclass(frozen=True)
class ImageSource:
    """An `ImageSource` is n images in an order.

    n: how many there are. facts: what they are, as plain values: other images have others. read: yields the images of
    some numbers, each (ch, H, W) uint8.
    """

    n: int
    facts: dict[str, Any]
    read: Callable[[range], Iterator[NDArray[np.uint8]]]

    def batches(self, batch_size: int, numbers: range | None = None) -> Iterator[Tensor]:
        """Yields the images of these numbers, by default all, in batches (B, ch, H, W) uint8."""
        images = self.read(range(self.n) if numbers is None else numbers)
        while part := list(itertools.islice(images, batch_size)):
            yield torch.from_numpy(np.stack(part))


def open_images(path: PathLike, size: Size | None = None) -> ImageSource:
    """Returns the images of a run's shards, or of whatever `load_images` takes.

    Pictures of a folder are read when they are wanted, by as many threads as there are cores.

    Args:
        path: The folder of a run that is done, a folder of pictures, or a file.
        size: Pixels along the sides that pictures of a folder get, as in `load_images`; None for a run.

    Raises:
        ArgumentError: A size is missing, or goes with nothing.
        DataError: There is nothing there, or something else.
    """
    if is_run(path):
        if size is not None:
            raise ArgumentError("size", "None, as shards have their own", size)
        shards = ShardImages(path)
        return ImageSource(len(shards), {"images": "shards", "sha256": shards.checksum()}, shards.read)
    if (found := open_pictures(path)) is not None:
        if size is None:
            raise ArgumentError("size", "pixels along a side, to which pictures are brought", None)
        sides = checked_size("size", size, MOST_SIZE)
        for note in found.notes:
            warnings.warn(note, TarFlowWarning, stacklevel=2)
        facts = {"images": "pictures", "size": sides, "sha256": _listing(path, found.paths)}
        return ImageSource(len(found.paths), facts, lambda numbers: found.read(numbers, sides))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*channels are taken as they are", TarFlowWarning)  # they are refused below
        images = load_images(path, size=size).images
    if images.is_floating_point():
        raise ArgumentError("images", "pictures", f"other data in {os.fspath(path)!r}")
    if images.shape[1] not in (1, 3):
        raise ArgumentError("images", "pictures of 1 or 3 channels", f"{images.shape[1]} in {os.fspath(path)!r}")
    pixels = images.numpy()
    digest = hashlib.sha256(str(pixels.shape).encode())
    for image in pixels:
        digest.update(np.ascontiguousarray(image).data)
    facts = {"images": "array", "sha256": digest.hexdigest()}
    return ImageSource(len(pixels), facts, lambda numbers: iter(pixels[numbers.start : numbers.stop]))


def training_images(path: PathLike, size: int, seed: int = 0) -> ImageSource:
    """Returns all pictures of a folder and those below, as ml-tarflow prepares them for its statistics.

    Args:
        path: The folder.
        size: Pixels along a side.
        seed: The seed by which half of the pictures are mirrored.

    Raises:
        DataError: There are no pictures.
    """
    paths = find_below(path)
    facts = {"images": "crops", "size": size, "seed": seed, "sha256": _listing(path, paths)}
    return ImageSource(len(paths), facts, lambda numbers: centre_crops(paths, size, numbers, seed))


def _listing(root: PathLike, paths: list[str]) -> str:
    """Returns the SHA-256, in hexadecimal, of the names of files below a folder and their sizes.

    paths: the files, which all begin with the folder's own path.
    """
    digest, start = hashlib.sha256(), len(os.fspath(Path(root)))
    for path in paths:
        name = path[start:].replace(os.sep, "/").lstrip("/")
        digest.update(f"{name} {os.stat(path).st_size}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
