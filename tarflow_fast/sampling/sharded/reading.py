"""The shards of a run are read back, batch by batch."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ...checks import check_count
from ...errors import DataError
from ...files import PathLike
from ...read_ahead import read_ahead
from .job import JOB, MANIFEST, read_json

Images = Iterator[NDArray[np.uint8]]
"""Images (H, W, ch)."""


def is_run(path: PathLike) -> bool:
    """Returns whether this is the folder of a run, which may not be done."""
    return (Path(path) / JOB).is_file()


def _manifest(out: PathLike) -> Any:
    folder = Path(out)
    if not (folder / MANIFEST).is_file():
        raise DataError(f"{str(folder)!r}: no {MANIFEST}, which a run has when all its images are there")
    manifest = read_json(folder / MANIFEST)
    for shard in manifest["shards"]:
        if not (folder / shard["file"]).is_file():
            raise DataError(f"{str(folder / shard['file'])!r}: a shard that is missing")
    return manifest


def shard_files(out: PathLike) -> tuple[str, list[Path]]:
    """Returns the name of the format of a run that is done, and the files of its shards, in order.

    Args:
        out: The folder of the run.

    Raises:
        ArgumentError: The manifest is damaged.
        DataError: There is no manifest, which a run has when all its images are there, or a shard is missing.
    """
    manifest = _manifest(out)
    return manifest["asked"]["format"], [Path(out) / shard["file"] for shard in manifest["shards"]]


class ShardImages:
    """The `ShardImages` of a run that is done are read from any one on.

    No more than a few are held, or a shard of `.npz`. out: the folder of the run. Raises ArgumentError where its
    manifest is damaged, and DataError as `shard_files` does, or where the shards hold no images.
    """

    def __init__(self, out: PathLike):
        manifest = _manifest(out)
        readers = {"npz": _npz, "png": _png, "tar": _tar}
        format = manifest["asked"]["format"]
        if format not in readers:
            raise DataError(f"{str(out)!r}: no images, but {format}")
        self._read = readers[format]
        self._shards = [(Path(out) / shard["file"], shard["images"], shard["sha256"]) for shard in manifest["shards"]]

    def __len__(self) -> int:
        return sum(count for _, count, _ in self._shards)

    def checksum(self) -> str:
        """Returns the SHA-256, in hexadecimal, of the shards'."""
        return hashlib.sha256("\n".join(sha256 for _, _, sha256 in self._shards).encode()).hexdigest()

    def read(self, numbers: range) -> Images:
        """Yields images (ch, H, W), the first of all being number 0."""
        start = 0
        for path, count, _ in self._shards:
            rows = range(max(numbers.start - start, 0), min(numbers.stop - start, count))
            if rows:
                yield from (image.transpose(2, 0, 1) for image in self._read(path, rows))
            start += count

    def counts(self) -> list[int]:
        """Returns how many images each shard has."""
        return [count for _, count, _ in self._shards]


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
    shards = ShardImages(out)
    start = 0
    for count in shards.counts():
        images = shards.read(range(start, start + count))
        start += count
        while part := list(itertools.islice(images, batch_size)):
            yield torch.from_numpy(np.stack(part))


def _npz(path: Path, rows: range) -> Images:
    with np.load(path) as file:
        images = file["arr_0"]
    if images.dtype != np.uint8:
        raise DataError(f"{str(path)!r}: no pictures, but {images.dtype} of shape {images.shape}")
    yield from images[rows.start : rows.stop]


def _picture(file: io.BytesIO | Path) -> NDArray[np.uint8]:
    with Image.open(file) as image:
        pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _png(path: Path, rows: range) -> Images:
    with path.open(newline="", encoding="utf-8") as file:
        listed = itertools.islice(csv.DictReader(file), rows.start, rows.stop)
        paths = [path.parent / row["file"] for row in listed]
    yield from read_ahead(lambda part: map(_picture, paths[part.start : part.stop]), range(len(paths)))


def _tar(path: Path, rows: range) -> Images:
    with tarfile.open(path) as archive:
        members = (member for member in archive if member.name.endswith(".png"))
        for member in itertools.islice(members, rows.start, rows.stop):
            content = archive.extractfile(member)
            if content is None:
                raise DataError(f"{str(path)!r}: {member.name!r} is no file")
            yield _picture(io.BytesIO(content.read()))
