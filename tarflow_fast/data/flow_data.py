"""A `FlowData` is what families of flows learn: vectors, images, sequences of tokens, or points on a manifold."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import check_count
from ..errors import ArgumentError, DataError, first_line
from ..files import PathLike
from .demonstrations import DEMONSTRATIONS, Arrays
from .load import load_images

KINDS = ("vectors", "images", "tokens", "sphere", "torus")
ON_SPHERE = 1e-3  # how far from 1 the norm of a point on the sphere may be


@dataclass(frozen=True)
class FlowData:
    """A `FlowData` is N samples of one kind, with their labels if they have any.

    Attributes:
        values: (N, D) float32 vectors, points of the sphere, or angles of the torus; (N, ch, H, W) uint8 pictures or
            float32 images that are no pictures; (N, T) int64 tokens.
        kind: One of "vectors", "images", "tokens", "sphere", "torus".
        labels: (N,) int64 labels, >= 0, or None.
        class_names: One name a class, or None.
        symbols: The text of each token of the vocabulary, or None.

    Raises:
        ArgumentError: Values are not of this kind.
    """

    values: Tensor
    kind: str
    labels: Tensor | None = None
    class_names: tuple[str, ...] | None = None
    symbols: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        dims = 4 if self.kind == "images" else 2
        if self.values.dim() != dims or 0 in self.values.shape:
            raise ArgumentError("data", f"{self.kind} of {dims} dimensions, none 0", tuple(self.values.shape))
        if self.values.is_floating_point() and not torch.isfinite(self.values).all():
            raise ArgumentError("data", "finite values", "infinities or NaNs")
        if self.kind == "tokens" and int(self.values.min()) < 0:
            raise ArgumentError("data", "tokens >= 0", int(self.values.min()))
        if self.kind == "sphere":
            off = float((self.values.norm(dim=1) - 1).abs().max())
            if off > ON_SPHERE:
                raise ArgumentError("data", "points of norm 1 on the sphere", f"a norm that is off by {off:.3g}")

    def __len__(self) -> int:
        return len(self.values)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.values.shape[1:])

    @property
    def levels(self) -> bool:
        """Whether the values are 8-bit levels."""
        return self.values.dtype == torch.uint8

    @property
    def vocabulary(self) -> int:
        """The number of different tokens."""
        return len(self.symbols) if self.symbols else int(self.values.max()) + 1

    @property
    def num_classes(self) -> int:
        """The number of classes: that of names, without them the highest label + 1; 0 without labels."""
        if self.labels is None:
            return 0
        return len(self.class_names) if self.class_names else int(self.labels.max()) + 1

    @property
    def fingerprint(self) -> int:
        """The CRC-32 of values and labels."""
        crc = zlib.crc32(self.values.contiguous().numpy().data)
        return crc if self.labels is None else zlib.crc32(self.labels.contiguous().numpy().data, crc)

    def check_classes(self, num_classes: int, names: Sequence[str] | None, argument: str = "data") -> None:
        """Raises ArgumentError where labels are not those of a model of so many classes, of these names if it has any.

        argument: the name under which the error tells it.
        """
        if self.labels is None:
            raise ArgumentError(argument, f"labels of {num_classes} classes", "none")
        if names and self.class_names and list(names) != list(self.class_names):
            raise ArgumentError(argument, f"the model's classes, {list(names)}", list(self.class_names))
        if int(self.labels.max()) >= num_classes:
            raise ArgumentError(argument, f"labels below {num_classes}, as the model has them", int(self.labels.max()))

    def spread(self, limit: int) -> FlowData:
        """Returns `limit` samples at even distances, or all where there are no more."""
        if check_count("limit", limit) >= len(self):
            return self
        rows = torch.arange(limit) * len(self) // limit
        return replace(self, values=self.values[rows], labels=None if self.labels is None else self.labels[rows])


def load_flow_data(path: PathLike, *, split: str = "train", manifold: str | None = None, **how: Any) -> FlowData:
    """Returns data of a demonstration by its name, or of a file.

    Args:
        path: A name in `DEMONSTRATIONS`; a `.npy` or `.npz` file with an array (N, D) of floats, which are vectors, or
            (N, T) of integers, which are tokens; or whatever `load_images` takes.
        split: "train" or "test".
        manifold: "sphere" or "torus" where vectors of a file are points there, else None.
        **how: The other arguments of `load_images`.

    Raises:
        ArgumentError: The values are not on the manifold.
        DataError: There is no such demonstration or file, or it cannot be read.
    """
    name = str(path)
    if name in DEMONSTRATIONS and not Path(name).exists():
        found = DEMONSTRATIONS[name]
        return _of_arrays(found.kind, found.make(split))
    if not Path(name).exists():
        raise DataError(f"{name!r}: no such file, folder or demonstration; these are {', '.join(DEMONSTRATIONS)}")
    arrays = _flat_arrays(Path(name), split)
    if arrays is not None:
        kind = "tokens" if arrays.values.dtype.kind in "iu" else manifold or "vectors"
        return _of_arrays(kind, arrays)
    images = load_images(path, split=split, **how)
    if images.sequences:
        raise DataError(f"{name!r}: sequences (N, T, D) of floats are for TarFlow; families take tokens (N, T)")
    return FlowData(images.images, "images", images.labels, images.names)


def _of_arrays(kind: str, arrays: Arrays) -> FlowData:
    dtype: Any = {"tokens": np.int64, "images": np.uint8}.get(kind, np.float32)
    labels = None if arrays.labels is None else torch.from_numpy(arrays.labels.astype(np.int64))
    values = torch.from_numpy(np.ascontiguousarray(arrays.values.astype(dtype)))
    return FlowData(values, kind, labels, arrays.class_names, arrays.symbols)


def _flat_arrays(path: Path, split: str) -> Arrays | None:
    """Returns the two-dimensional array of a file, with labels, or None where the file has no such thing."""
    if path.suffix.lower() not in (".npy", ".npz"):
        return None
    try:
        found: Any = np.load(path, allow_pickle=False, mmap_mode="r" if path.suffix.lower() == ".npy" else None)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{str(path)!r}: not a whole file of plain arrays ({first_line(error)})") from error
    if isinstance(found, np.ndarray):
        return Arrays(np.array(found)) if found.ndim == 2 else None
    with found:
        for values, labels in ((f"x_{split}", f"y_{split}"), ("x", "y"), ("data", "labels"), ("arr_0", "arr_1")):
            if values in found.files and found[values].ndim == 2:
                return Arrays(found[values], found[labels].reshape(-1) if labels in found.files else None)
    return None
