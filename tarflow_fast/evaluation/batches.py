"""Both measures take the data as the model's, and batches of them with noise."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from ..checks import Labels, check_count, short
from ..data import ImageData, matched
from ..errors import ArgumentError, TarFlowError
from ..limits import MOST_NUMBER
from ..models.density import TarFlowDensity
from ..scalars import check_flag
from .noise import Noise


def batches(
    model: TarFlowDensity, images: Tensor, noise: Noise, draws: int, batch_size: int, progress: bool, title: str
) -> Iterator[tuple[slice, Tensor]]:
    """Yields each batch of each draw: which images it has, and their x on the model's device, in its dtype.

    title: the text before the bar. Raises ArgumentError for a wrong `draws`, `batch_size` or `progress`.
    """
    draws, batch_size = check_count("draws", draws, high=MOST_NUMBER), check_count("batch_size", batch_size)
    progress = check_flag("progress", progress)
    n = len(images)
    with tqdm(total=draws * n, desc=title, unit="image", disable=not progress, leave=False) as bar:
        for draw in range(draws):
            for first in range(0, n, batch_size):
                rows = slice(first, min(first + batch_size, n))
                yield rows, noise.add(images[rows], first, draw).to(model.device, model.dtype)
                bar.update(rows.stop - rows.start)


def checked_noise(noise: object) -> Noise | None:
    if noise is not None and not isinstance(noise, Noise):
        raise ArgumentError("noise", "a Noise, or None", type(noise).__name__)
    return noise


def autocast_of(model: TarFlowDensity, dtype: torch.dtype | None) -> torch.autocast:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in (torch.bfloat16, torch.float16)):
        got = short(dtype) if isinstance(dtype, torch.dtype) else repr(dtype)
        raise ArgumentError("autocast", "None, torch.bfloat16 or torch.float16", got)
    return torch.autocast(model.device.type, dtype, enabled=dtype is not None)


def unpacked(model: TarFlowDensity, images: Tensor | ImageData, labels: Labels) -> tuple[Tensor, Labels]:
    """Returns images and their labels as the model has them. Raises ArgumentError for those that it cannot take."""
    if isinstance(images, ImageData):
        if labels is not None:
            raise ArgumentError("labels", "None, as the data have their own", type(labels).__name__)
        data = matched(images, model.metadata.get("class_names"), model.config.num_classes, "images")
        images, labels = data.images, data.labels
    elif not isinstance(images, Tensor) or images.dtype != torch.uint8:
        got = short(images.dtype) if isinstance(images, Tensor) else type(images).__name__
        raise ArgumentError("images", "a uint8 tensor, or ImageData(images) for data that are no pictures", got)
    shape = model.config.data_shape
    if tuple(images.shape[1:]) != shape or images.shape[0] == 0:
        raise ArgumentError("images", f"shape (n >= 1, {', '.join(map(str, shape))})", tuple(images.shape))
    return images, labels


def check_finite(values: Tensor) -> None:
    """Raises TarFlowError unless all values are finite. values: (n, ...), one row an image."""
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad):
        raise TarFlowError(f"the density of image {int(bad[0, 0])} is not finite; evaluate it in float32")
