"""`bayes_accuracy` is the accuracy of the classifier that Bayes' rule makes of a class-conditional model."""

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
from .batches import Averages, unpacked
from .noise import Noise


@dataclass(frozen=True)
class BayesAccuracy:
    """A `BayesAccuracy` is what `bayes_accuracy` found.

    Attributes:
        accuracy: p, the share of images whose most probable class is the label.
        standard_error: √(p(1 − p)/n), of p.
        correct: The number of images whose most probable class is the label.
        images: n, the number of images.
        draws: The number of noise draws for each image.
        noise: The noise on the images.
        seconds: The time that it took.
    """

    accuracy: float
    standard_error: float
    correct: int
    images: int
    draws: int
    noise: Noise
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields by their names, `noise` as a dict of its own."""
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
    """argmax_y p(y | x) = argmax_y log p(x | y) under a uniform prior: measures how often this is the label.

    An image costs num_classes · draws density passes, which run on the model's device.

    Args:
        model: A class-conditional TarFlow.
        images: (n, ch, H, W) uint8, or (n, T, D) floats for a model of sequences; or ImageData (`load_images`), whose
            labels are matched with the model's classes by name.
        labels: One label for each image, or one for all, none negative; None with ImageData.
        noise: The noise on the images, by default none, as in ml-tarflow. An image's noise is the same for every class.
        draws: The number of noise draws for each image, over which log p(x | y) is averaged.
        batch_size: The number of images in one pass.
        autocast: torch.bfloat16 or torch.float16 for speed, by default none.
        progress: Whether to show a bar.

    Returns:
        The accuracy, and how it was measured.

    Raises:
        ArgumentError: An argument has the wrong type, shape or range; the model has no classes, or not those of the
            data; an image has no label.
        TarFlowError: A density is not finite.
    """
    classes = check_model(model).config.num_classes
    if classes == 0:
        raise ArgumentError("model", "a class-conditional model", "an unconditional one")
    noise = Noise("none") if noise is None else noise
    averages = Averages(model, noise, draws, batch_size, autocast, progress, "accuracy")
    start = time.perf_counter()
    images, labels = unpacked(model, images, labels)
    n = len(images)
    truth = batch_labels(labels, n, classes, torch.device("cpu"), "labels")
    if truth is None or bool((truth < 0).any()):
        raise ArgumentError("labels", "a class for every image", "None or a negative label")

    def by_class(rows: slice, x: Tensor) -> Tensor:
        return torch.stack([model.log_prob(x, c) for c in range(classes)], dim=1)

    correct = int((averages.of(by_class, images).argmax(1) == truth).sum())
    p = correct / n
    return BayesAccuracy(p, math.sqrt(p * (1 - p) / n), correct, n, draws, noise, time.perf_counter() - start)
