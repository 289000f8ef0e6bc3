"""An `ImageData` has images and labels, however they were stored."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..checks import check_count, check_dense
from ..errors import ArgumentError

ROWS = 4096  # so many images are looked at together


@dataclass(frozen=True)
class ImageData:
    """An `ImageData` is N images, or sequences, with their labels if they have any.

    Attributes:
        images: (N, ch, H, W) uint8 pictures, or finite float32 for data that are no pictures (latents), which models
            take as they are; or (N, T, D) finite float32 sequences.
        labels: (N,) int64 labels, >= 0, or None.
        class_names: One name a class, no two alike, or None.
        numbers: The label that each class had where it was stored, or None where the labels are the same.

    Raises:
        ArgumentError: A field has another type, shape or range.
    """

    images: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] | None = None
    numbers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for argument in ("images", "labels"):
            tensor = getattr(self, argument)
            if isinstance(tensor, Tensor):
                check_dense(argument, tensor)
            elif argument == "images" or tensor is not None:
                raise ArgumentError(argument, "a tensor", type(tensor).__name__)
        for argument, kind in (("class_names", str), ("numbers", (int, np.integer))):
            known = getattr(self, argument)
            if known is not None and not (isinstance(known, (tuple, list)) and all(isinstance(k, kind) for k in known)):
                what = "names" if argument == "class_names" else "integers"
                raise ArgumentError(argument, f"a tuple of {what}, or None", type(known).__name__)
        shape = tuple(self.images.shape)
        dims = {torch.uint8: (4,), torch.float32: (4, 3)}.get(self.images.dtype, ())
        if len(shape) not in dims or 0 in shape:
            expected = (
                "uint8 (N, ch, H, W) or, for data that are no pictures, float32 (N, ch, H, W) or (N, T, D); "
                "none of them 0"
            )
            raise ArgumentError("images", expected, f"{self.images.dtype} {shape}")
        if self.images.is_floating_point() and not all(torch.isfinite(part).all() for part in self.images.split(ROWS)):
            raise ArgumentError("images", "finite values", "infinities or NaNs")
        if self.class_names is not None and len(set(self.class_names)) < len(self.class_names):
            twice = next(name for name in self.class_names if self.class_names.count(name) > 1)
            raise ArgumentError("class_names", "a name of its own for each class", f"{twice!r} more than once")
        if self.labels is not None:
            if self.labels.dtype != torch.int64 or tuple(self.labels.shape) != shape[:1]:
                got = f"{self.labels.dtype} {tuple(self.labels.shape)}"
                raise ArgumentError("labels", f"{shape[0]} int64 labels", got)
            if int(self.labels.min()) < 0:
                raise ArgumentError("labels", "labels >= 0", int(self.labels.min()))
            for argument, given in (("class_names", self.class_names), ("numbers", self.numbers)):
                if given is not None and int(self.labels.max()) >= len(given):
                    raise ArgumentError(argument, f"names for labels up to {int(self.labels.max())}", len(given))

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def sequences(self) -> bool:
        """Whether these are sequences, (N, T, D), or else images."""
        return self.images.dim() == 3

    @property
    def kind(self) -> str:
        """What messages call the data: "images" or "sequences"."""
        return "sequences" if self.sequences else "images"

    @property
    def num_classes(self) -> int:
        """The number of classes: that of names or numbers, without them the highest label + 1; 0 without labels."""
        if self.labels is None:
            return 0
        known = self.class_names or self.numbers
        return len(known) if known else int(self.labels.max()) + 1

    @property
    def names(self) -> tuple[str, ...] | None:
        """The names by which a model that learns these data should call its classes.

        They are the names of the classes, without these the numbers where those differ from the labels, else None.
        """
        if self.class_names is not None or self.numbers is None or self.numbers == tuple(range(len(self.numbers))):
            return self.class_names
        return tuple(map(str, self.numbers))

    def spread(self, limit: int) -> ImageData:
        """Takes images at even distances, as data may be sorted by class.

        Args:
            limit: The number of images to take, >= 1.

        Returns:
            `limit` images with their labels, or all where there are no more.

        Raises:
            ArgumentError: The limit is no integer >= 1.
        """
        if check_count("limit", limit) >= len(self):
            return self
        rows = torch.arange(limit) * len(self) // limit
        return replace(self, images=self.images[rows], labels=None if self.labels is None else self.labels[rows])

    @property
    def fingerprint(self) -> int:
        """The CRC-32 of images and labels."""
        crc = zlib.crc32(self.images.contiguous().numpy().data)
        return crc if self.labels is None else zlib.crc32(self.labels.contiguous().numpy().data, crc)
