"""`bits_per_dim` measures the bits per dimension of a model on data."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import Labels, batch_labels
from ..data import ImageData
from ..errors import ArgumentError
from ..models.density import TarFlowDensity
from .batches import Averages, unpacked
from .noise import Noise


@dataclass(frozen=True)
class BitsPerDim:
    """A `BitsPerDim` is what `bits_per_dim` found.

    Attributes:
        mean: The bits per dimension, averaged over images.
        standard_error: The standard error of that mean, or None for a single image.
        images: The number of images.
        draws: The number of noise draws for each image.
        noise: The noise on the images.
        seconds: The time that it took.
    """

    mean: float
    standard_error: float | None
    images: int
    draws: int
    noise: Noise
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields by their names, `noise` as a dict of its own."""
        return asdict(self)


def bits_per_dim(
    model: TarFlowDensity,
    images: Tensor | ImageData,
    labels: Labels = None,
    *,
    noise: Noise | None = None,
    draws: int = 1,
    batch_size: int = 128,
    autocast: torch.dtype | None = None,
    progress: bool = False,
) -> BitsPerDim:
    """−log2 p(x | y) / N + log2(128), N = values per image: averages this, `TarFlow.bits_per_dim`, over images.

    With uniform dequantisation it is, in expectation, an upper bound on the bits that a code by this model
    takes for an 8-bit value, and compares with other models' figures. With Gaussian noise it is the density
    of noisy images, and compares between models of one noise level only. The passes run on the model's device.

    Sequences, and other data that are no pictures, have no levels: of these it is −log2 p(x | y) / N, the differential
    entropy in the data's own unit, which may be negative (see `TarFlow.bits_per_dim`). Gaussian noise is added where
    the model was trained with it, else none.

    Args:
        model: A TarFlow.
        images: (n, ch, H, W) uint8, or (n, T, D) floats for a model of sequences; or ImageData (`load_images`), whose
            labels are matched with the model's classes by name.
        labels: One label for each image, one for all, or None (no class); None with ImageData.
        noise: The noise on the images, by default what the model was trained with (`Noise.of`).
        draws: The number of noise draws for each image, over which its bits are averaged.
        batch_size: The number of images in one pass.
        autocast: torch.bfloat16 or torch.float16 for speed, by default none.
        progress: Whether to show a bar.

    Returns:
        The mean, its standard error, and how they were measured.

    Raises:
        ArgumentError: An argument has the wrong type, shape or range, or the model does not have the classes of the
            data.
        TarFlowError: A density is not finite.
    """
    noise = Noise.of(model) if noise is None else noise
    averages = Averages(model, noise, draws, batch_size, autocast, progress, "bits/dim")
    start = time.perf_counter()
    images, labels = unpacked(model, images, labels)
    if noise.kind == "none" and not images.is_floating_point():
        raise ArgumentError("noise", "'uniform' or 'gaussian', as 8-bit values have no density", "'none'")
    n = len(images)
    y = batch_labels(labels, n, model.config.num_classes, model.device, "labels")
    bits = averages.of(lambda rows, x: model.bits_per_dim(x, None if y is None else y[rows]), images)
    error = float(bits.std()) / math.sqrt(n) if n > 1 else None
    return BitsPerDim(float(bits.mean()), error, n, draws, noise, time.perf_counter() - start)
