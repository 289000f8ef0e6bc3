"""The shards of a run are read back, batch by batch."""

from __future__ import annotations

import csv
import io
import itertools
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ...checks import check_count
from ...errors import DataError
from ...files import PathLike
from .job import MANIFEST, read_json


def shard_files(out: PathLike) -> tuple[str, list[Path]]:
    """Returns the name of the format of a run that is done, and the files of its shards, in order.

    Args:
        out: The folder of the run.

    Raises:
        ArgumentError: The manifest is damaged.
        DataError: There is no manifest, which a run has when all its images are there, or a shard is missing.
    """
    folder = Path(out)
    if not (folder / MANIFEST).is_file():
        raise DataError(f"{str(folder)!r}: no {MANIFEST}, which a run has when all its images are there")
    manifest = read_json(folder / MANIFEST)
    paths = [folder / shard["file"] for shard in manifest["shards"]]
    for path in paths:
        if not path.is_file():
            raise DataError(f"{str(path)!r}: a shard that is missing")
    return manifest["asked"]["format"], paths


def read_shards(out: PathLike, batch_size: int = 256) -> Iterator[Tensor]:
    """Yields the images of a run that is done, in the order of their numbers: (B, ch, H, W) uint8.

    No more than a batch is held, or a shard of `.npz`.

    Args:
        out: The folder of the run.
        batch_size: The number of images in a batch; the last one of a shard may have fewer.

    Raises:
        ArgumentError: The manifest is damaged.
        DataError: As in `shard_files`; or the shards hold no images.
    """
    batch_size = check_count("batch_size", batch_size)
    format, paths = shard_files(out)
    readers = {"npz": _npz, "png": _png, "tar": _tar}
    if format not in readers:
        raise DataError(f"{str(out)!r}: no images, but {format}")
    for path in paths:
        images = readers[format](path)
        while part := list(itertools.islice(images, batch_size)):
            yield torch.from_numpy(np.stack(part)).permute(0, 3, 1, 2)


def _npz(path: Path) -> Iterator[NDArray[np.uint8]]:
    with np.load(path) as file:
        images = file["arr_0"]
    if images.dtype != np.uint8:
        raise DataError(f"{str(path)!r}: no pictures, but {images.dtype} of shape {images.shape}")
    yield from images


def _picture(file: io.BytesIO | Path) -> NDArray[np.uint8]:
    with Image.open(file) as image:
        pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _png(path: Path) -> Iterator[NDArray[np.uint8]]:
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            yield _picture(path.parent / row["file"])


def _tar(path: Path) -> Iterator[NDArray[np.uint8]]:
    with tarfile.open(path) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.name.endswith(".png") else None
            if content is not None:
                yield _picture(io.BytesIO(content.read()))
