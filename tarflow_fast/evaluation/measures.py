"""All the measures of images, from one pass over their features."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ArgumentError
from .features import Features
from .fid import FeatureSums, Gaussian, check_size, frechet_distance
from .manifold import NEIGHBOURS, precision_recall
from .mmd import kernel_distance
from .score import SPLITS, inception_score


class FeatureSet:
    """A `FeatureSet` takes up the features of images, batch by batch, and keeps what the measures need of them.

    Args:
        keep: Whether it keeps features and logits themselves, 12 KB an image, and not only the sums of the pooled ones.
        spatial: Whether it keeps the sums of the spatial ones, by default where it keeps features.
        like: What they will be compared to, if there is anything: features of another size are refused at once.
    """

    def __init__(self, keep: bool = False, *, spatial: bool | None = None, like: Gaussian | None = None):
        self.keep, self._like = keep, like
        self._with_spatial = keep if spatial is None else spatial
        self._pooled: list[Tensor] = []
        self._logits: list[Tensor] = []
        self._sums: FeatureSums | None = None
        self._spatial: FeatureSums | None = None

    @property
    def n(self) -> int:
        return 0 if self._sums is None else self._sums.n

    def add(self, features: Features) -> None:
        """Adds the features of a batch. Raises ArgumentError for infinities and NaNs, and for another size."""
        if self._sums is None or self._spatial is None:
            if self._like is not None:
                check_size(features.pooled.shape[1], self._like)
            self._sums = FeatureSums(features.pooled.shape[1])
            self._spatial = FeatureSums(features.spatial.shape[1])
        self._sums.add(features.pooled)
        if self._with_spatial:
            self._spatial.add(features.spatial)
        if self.keep:
            self._pooled.append(features.pooled.detach().cpu())
            self._logits.append(features.logits.detach().cpu())

    @property
    def sums(self) -> FeatureSums:
        """The sums of the pooled features. Raises ArgumentError where there are none."""
        if self._sums is None:
            raise ArgumentError("images", "at least two, to have a covariance", 0)
        return self._sums

    def gaussian(self) -> Gaussian:
        """Returns the statistics of the pooled features. Raises ArgumentError for fewer than two images."""
        return self.sums.gaussian()

    def spatial_gaussian(self) -> Gaussian | None:
        """Returns the statistics of the spatial features, or None where they are not kept."""
        return self._spatial.gaussian() if self._with_spatial and self._spatial is not None else None

    def pooled(self) -> Tensor:
        """Returns the pooled features (n, d) that were kept."""
        return torch.cat(self._pooled)

    def logits(self) -> Tensor:
        """Returns the logits (n, c) that were kept."""
        return torch.cat(self._logits)


def compute_measures(
    images: FeatureSet,
    reference: FeatureSet | None = None,
    *,
    statistics: Gaussian | None = None,
    spatial: Gaussian | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """Returns the measures of images that can be had, by name.

    Args:
        images: What is measured; where it keeps its features, more can be had.
        reference: The features of the reference's images, which are kept, if there are any.
        statistics: The pooled features of the reference, by default those of `reference`.
        spatial: Its spatial features, as `statistics`.
        device: Where distances between features are computed, in fp64, for precision and recall.

    Returns:
        A dict with "fid"; and with kept features "sfid", "inception_score" and "inception_score_std"; and with those of
        a reference "kid", "kid_std", "precision" and "recall". What there is no reference for, or are too few images
        for, is left out.

    Raises:
        ArgumentError: There are fewer than two images, or the reference's features have another size.
    """
    if reference is not None:
        statistics = statistics or reference.gaussian()
        spatial = spatial or reference.spatial_gaussian()
    own, own_spatial = images.gaussian(), images.spatial_gaussian()
    found: dict[str, float] = {}
    if statistics is not None:
        found["fid"] = frechet_distance(own, statistics)
    if spatial is not None and own_spatial is not None:
        found["sfid"] = frechet_distance(own_spatial, spatial)
    if not images.keep:
        return found
    if images.n >= SPLITS:
        found["inception_score"], found["inception_score_std"] = inception_score(images.logits())
    if reference is not None and reference.keep:
        a, b = images.pooled(), reference.pooled()
        found["kid"], found["kid_std"] = kernel_distance(a, b)
        if min(len(a), len(b)) > NEIGHBOURS:
            found["precision"], found["recall"] = precision_recall(a.to(device), b)
    return found
