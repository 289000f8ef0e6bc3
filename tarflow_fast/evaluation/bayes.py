"""The accuracy of the classifier that Bayes' rule makes of a class-conditional model."""

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
from ..models.density import TarFlowDensity, check_model
from .batches import autocast_of, batches, check_finite, checked_noise, unpacked
from .noise import Noise


@dataclass(frozen=True)
class BayesAccuracy:
    """What `bayes_accuracy` found. standard_error: √(p(1 − p)/n)."""

    accuracy: float
    standard_error: float
    correct: int
    images: int
    draws: int
    noise: Noise
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def bayes_accuracy(
    model: TarFlowDensity,
    images: Tensor | ImageData,
    labels: Labels = None,
    *,
    noise: Noise | None = None,
    draws: int = 1,
    batch_size: int = 128,
    autocast: torch.dtype | None = None,
    progress: bool = False,
) -> BayesAccuracy:
    """How often argmax_y p(y | x) = argmax_y log p(x | y) is the label: Bayes' rule under a uniform prior.

    images: (n, ch, H, W) uint8; labels: n of them (or an int for all), none negative; or images with their labels as
    ImageData (`load_images`), matched with the model's classes by name; noise: none unless
    given, as in ml-tarflow; an image's noise is the same for every class; draws: log p(x | y) is averaged
    over so many noise draws; batch_size, autocast: as for `bits_per_dim`. An image costs num_classes · draws
    density passes. Raises ArgumentError, and TarFlowError for a density that is not finite.
    """
    model, noise = check_model(model), checked_noise(noise)
    classes = model.config.num_classes
    if classes == 0:
        raise ArgumentError("model", "a class-conditional model", "an unconditional one")
    noise = Noise("none") if noise is None else noise
    start = time.perf_counter()
    images, labels = unpacked(model, images, labels)
    n = len(images)
    truth = batch_labels(labels, n, classes, torch.device("cpu"), "labels")
    if truth is None or bool((truth < 0).any()):
        raise ArgumentError("labels", "a class for every image", "None or a negative label")
    log_p = torch.zeros(n, classes, dtype=torch.float64, device="cpu")
    with torch.no_grad(), autocast_of(model, autocast):
        for rows, x in batches(model, images, noise, draws, batch_size, progress, "accuracy"):
            for c in range(classes):
                y = torch.full((len(x),), c, device=x.device)
                log_p[rows, c] += model.log_prob(x, y).cpu()
    check_finite(log_p)
    correct = int((log_p.argmax(1) == truth).sum())
    p = correct / n
    return BayesAccuracy(p, math.sqrt(p * (1 - p) / n), correct, n, draws, noise, time.perf_counter() - start)
