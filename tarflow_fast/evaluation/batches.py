"""Both measures average a density over draws of noise, of data that are held to be the model's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from ..checks import Labels, check_count, kind_of, short
from ..data import ImageData, matched
from ..errors import ArgumentError, TarFlowError
from ..limits import MOST_NUMBER
from ..models.density import TarFlowDensity, check_model
from ..scalars import check_flag
from .noise import Noise

Density = Callable[[slice, Tensor], Tensor]
"""A function of which data a batch has, and their noised x (B, …), that returns densities (B,) or (B, m)."""


@dataclass(frozen=True)
class Averages:
    """`Averages` are taken of densities, over draws of the noise.

    model: the model, on whose device the passes run. noise: the noise on the data. draws: the number of draws for each
    datum. batch_size: the number of data in one pass. autocast: bfloat16 or float16 for speed, or None. progress:
    whether to show a bar. title: the text before it. Raises ArgumentError for another type or range of these.
    """

    model: TarFlowDensity
    noise: Noise
    draws: int
    batch_size: int
    autocast: torch.dtype | None
    progress: bool
    title: str

    def __post_init__(self) -> None:
        check_model(self.model)
        if not isinstance(self.noise, Noise):
            raise ArgumentError("noise", "a Noise, or None", kind_of(self.noise))
        check_count("draws", self.draws, high=MOST_NUMBER)
        check_count("batch_size", self.batch_size)
        check_flag("progress", self.progress)
        half = (torch.bfloat16, torch.float16)
        if self.autocast is not None and not (isinstance(self.autocast, torch.dtype) and self.autocast in half):
            got = short(self.autocast) if isinstance(self.autocast, torch.dtype) else repr(self.autocast)
            raise ArgumentError("autocast", "None, torch.bfloat16 or torch.float16", got)

    @property
    def _one(self) -> str:
        """Returns what messages call one of the data."""
        return self.model.config.kind.removesuffix("s")

    @torch.no_grad()
    def of(self, density: Density, images: Tensor) -> Tensor:
        """Returns the densities of images (n, …), averaged over draws: (n,) or (n, m) fp64 on the CPU.

        Raises TarFlowError where one is not finite.
        """
        found: Tensor | None = None
        with torch.autocast(self.model.device.type, self.autocast, enabled=self.autocast is not None):
            for rows, x in self._batches(images):
                values = density(rows, x).cpu()
                if found is None:
                    found = values.new_zeros((len(images), *values.shape[1:]), dtype=torch.float64)
                found[rows] += values
        assert found is not None
        bad = (~torch.isfinite(found)).nonzero()
        if len(bad):
            raise TarFlowError(f"the density of {self._one} {int(bad[0, 0])} is not finite; evaluate it in float32")
        return found / self.draws

    def _batches(self, images: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yields each batch of each draw: which images it has, and their x on the model's device, in its dtype."""
        n, draws, progress = len(images), int(self.draws), bool(self.progress)
        with tqdm(total=draws * n, desc=self.title, unit=self._one, disable=not progress, leave=False) as bar:
            for draw in range(draws):
                for first in range(0, n, int(self.batch_size)):
                    rows = slice(first, min(first + int(self.batch_size), n))
                    yield rows, self.noise.add(images[rows], first, draw).to(self.model.device, self.model.dtype)
                    bar.update(rows.stop - rows.start)


def unpacked(model: TarFlowDensity, images: Tensor | ImageData, labels: Labels) -> tuple[Tensor, Labels]:
    """Returns images and their labels as the model has them. Raises ArgumentError for those that it cannot take."""
    if isinstance(images, ImageData):
        if labels is not None:
            raise ArgumentError("labels", "None, as the data have their own", kind_of(labels))
        data = matched(images, model.metadata.get("class_names"), model.config.num_classes, "images")
        images, labels = data.images, data.labels
    elif model.config.layout == "tokens":
        if not isinstance(images, Tensor) or not images.is_floating_point():
            got = short(images.dtype) if isinstance(images, Tensor) else kind_of(images)
            raise ArgumentError("images", "a floating-point tensor (n, T, D), as the model's data are sequences", got)
        images = ImageData(images.to(torch.float32)).images
    elif not isinstance(images, Tensor) or images.dtype != torch.uint8:
        got = short(images.dtype) if isinstance(images, Tensor) else kind_of(images)
        raise ArgumentError("images", "a uint8 tensor, or ImageData(images) for data that are no pictures", got)
    shape = model.config.data_shape
    if tuple(images.shape[1:]) != shape or images.shape[0] == 0:
        raise ArgumentError("images", f"shape (n >= 1, {', '.join(map(str, shape))})", tuple(images.shape))
    return images, labels
