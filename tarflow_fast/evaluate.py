"""How good a model is on data: bits per dimension, and accuracy as a classifier by Bayes' rule."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .checks import Labels, batch_labels, check_choice, check_count, check_number, short
from .data import ImageData, matched
from .errors import ArgumentError, TarFlowError
from .limits import MOST_NUMBER
from .model import TarFlow, check_model
from .scalars import check_flag, plain

NOISES = ("uniform", "gaussian", "none")


@dataclass(frozen=True)
class Noise:
    """What is added to an 8-bit image v before its density is taken. Data that are no pictures are x already.

    kind: "uniform": x = (v + u)/128 − 1, u uniform in [0, 1); "gaussian": x = v/127.5 − 1 + σε; "none": x =
    v/127.5 − 1. std: σ > 0, on the scale of x; 0 unless gaussian. seed: image i's noise depends on (seed, i)
    alone. Raises ArgumentError.
    """

    kind: str = "uniform"
    std: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("noise", self.kind, NOISES)
        object.__setattr__(self, "seed", check_count("seed", self.seed, low=0))
        object.__setattr__(self, "std", plain(self.std))
        if self.kind == "gaussian":
            check_number("noise_std", self.std, 0, open_low=True)
        elif self.std != 0:
            raise ArgumentError("noise_std", f"no level with {self.kind!r} noise", repr(self.std))

    @classmethod
    def of(cls, model: TarFlow, kind: str = "auto", std: float | None = None, seed: int = 0) -> Noise:
        """Noise of a kind and level; what is left out ("auto", None) is what the model was trained with.

        A model whose metadata tells nothing is taken to be trained with uniform noise. Raises ArgumentError
        for Gaussian noise whose level is neither given nor in the metadata.
        """
        known = model.metadata
        if kind == "auto":
            kind = "gaussian" if std is not None or "noise_std" in known else "uniform"
            kind = kind if std is not None else known.get("noise_type", kind)
        if kind == "gaussian" and std is None:
            if "noise_std" not in known:
                raise ArgumentError("noise_std", "a level, as the model's metadata names none", "None")
            std = known["noise_std"]
        return cls(kind, 0.0 if std is None else std, seed)

    def __str__(self) -> str:
        if self.kind == "gaussian":
            return f"Gaussian noise, σ = {self.std:g}"
        return "uniform dequantisation" if self.kind == "uniform" else "no noise"

    def add(self, images: Tensor, first: int = 0, draw: int = 0) -> Tensor:
        """x, fp32, of images (n, ch, H, W) uint8 that are numbered from `first`; draw: which of several.

        float32 images are data that are no pictures, of which x is v + σε or v. Raises ArgumentError for uniform noise
        on them.
        """
        v = images.cpu().numpy().astype(np.float32)
        if images.is_floating_point():
            if self.kind == "uniform":
                raise ArgumentError("noise", "'gaussian', as only 8-bit values can be dequantised", "'uniform'")
        elif self.kind != "uniform":
            v = v / 127.5 - 1
        if self.kind == "none":
            return torch.from_numpy(v)
        noise = np.empty(v.shape, np.float32)
        for i, values in enumerate(noise, start=first):
            rng = np.random.default_rng([self.seed, i, draw])
            fill = rng.random if self.kind == "uniform" else rng.standard_normal
            fill(dtype=np.float32, out=values)
        if self.kind == "uniform":
            return torch.from_numpy((v + noise) / 128 - 1)
        return torch.from_numpy(v + self.std * noise)


@dataclass(frozen=True)
class BitsPerDim:
    """What `bits_per_dim` found. standard_error: of the mean over images; None for a single image."""

    mean: float
    standard_error: float | None
    images: int
    draws: int
    noise: Noise
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


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


def bits_per_dim(
    model: TarFlow,
    images: Tensor | ImageData,
    labels: Labels = None,
    *,
    noise: Noise | None = None,
    draws: int = 1,
    batch_size: int = 128,
    autocast: torch.dtype | None = None,
    progress: bool = False,
) -> BitsPerDim:
    """−log2 p(x | y) / N + log2(128), N = values per image, averaged over images: `TarFlow.bits_per_dim`.

    With uniform dequantisation it is, in expectation, an upper bound on the bits that a code by this model
    takes for an 8-bit value, and compares with other models' figures. With Gaussian noise it is the density
    of noisy images, and compares between models of one noise level only.

    images: (n, ch, H, W) uint8, or ImageData (`load_images`), whose labels are matched with the model's classes by
    name; labels: n of them, an int for all, or None (no class); noise: the model's own unless given (`Noise.of`);
    draws: noise draws averaged for each image; batch_size: images in one pass;
    autocast: torch.bfloat16 or float16 for speed. Runs where the model is. Raises ArgumentError, and
    TarFlowError for a density that is not finite.
    """
    model, noise = check_model(model), _noise(noise)
    noise = Noise.of(model) if noise is None else noise
    if noise.kind == "none":
        raise ArgumentError("noise", "'uniform' or 'gaussian', as 8-bit values have no density", "'none'")
    start = time.perf_counter()
    images, labels = _unpacked(model, images, labels)
    n = len(images)
    y = batch_labels(labels, n, model.config.num_classes, model.device, "labels")
    bits = torch.zeros(n, dtype=torch.float64, device="cpu")
    with torch.no_grad(), _autocast(model, autocast):
        for rows, x in _batches(model, images, noise, draws, batch_size, progress, "bits/dim"):
            bits[rows] += model.bits_per_dim(x, None if y is None else y[rows]).cpu()
    _check_finite(bits)
    bits /= draws
    error = float(bits.std()) / math.sqrt(n) if n > 1 else None
    return BitsPerDim(float(bits.mean()), error, n, draws, noise, time.perf_counter() - start)


def bayes_accuracy(
    model: TarFlow,
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
    model, noise = check_model(model), _noise(noise)
    classes = model.config.num_classes
    if classes == 0:
        raise ArgumentError("model", "a class-conditional model", "an unconditional one")
    noise = Noise("none") if noise is None else noise
    start = time.perf_counter()
    images, labels = _unpacked(model, images, labels)
    n = len(images)
    truth = batch_labels(labels, n, classes, torch.device("cpu"), "labels")
    if truth is None or bool((truth < 0).any()):
        raise ArgumentError("labels", "a class for every image", "None or a negative label")
    log_p = torch.zeros(n, classes, dtype=torch.float64, device="cpu")
    with torch.no_grad(), _autocast(model, autocast):
        for rows, x in _batches(model, images, noise, draws, batch_size, progress, "accuracy"):
            for c in range(classes):
                y = torch.full((len(x),), c, device=x.device)
                log_p[rows, c] += model.log_prob(x, y).cpu()
    _check_finite(log_p)
    correct = int((log_p.argmax(1) == truth).sum())
    p = correct / n
    return BayesAccuracy(p, math.sqrt(p * (1 - p) / n), correct, n, draws, noise, time.perf_counter() - start)


def _batches(
    model: TarFlow, images: Tensor, noise: Noise, draws: int, batch_size: int, progress: bool, title: str
) -> Iterator[tuple[slice, Tensor]]:
    """Each batch of each draw: which images, and their x where the model is."""
    draws, batch_size = check_count("draws", draws, high=MOST_NUMBER), check_count("batch_size", batch_size)
    progress = check_flag("progress", progress)
    n = len(images)
    with tqdm(total=draws * n, desc=title, unit="image", disable=not progress, leave=False) as bar:
        for draw in range(draws):
            for first in range(0, n, batch_size):
                rows = slice(first, min(first + batch_size, n))
                yield rows, noise.add(images[rows], first, draw).to(model.device, model.dtype)
                bar.update(rows.stop - rows.start)


def _noise(noise: object) -> Noise | None:
    if noise is not None and not isinstance(noise, Noise):
        raise ArgumentError("noise", "a Noise, or None", type(noise).__name__)
    return noise


def _autocast(model: TarFlow, dtype: torch.dtype | None) -> torch.autocast:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in (torch.bfloat16, torch.float16)):
        got = short(dtype) if isinstance(dtype, torch.dtype) else repr(dtype)
        raise ArgumentError("autocast", "None, torch.bfloat16 or torch.float16", got)
    return torch.autocast(model.device.type, dtype, enabled=dtype is not None)


def _unpacked(model: TarFlow, images: Tensor | ImageData, labels: Labels) -> tuple[Tensor, Labels]:
    """Images and their labels as the model's."""
    if isinstance(images, ImageData):
        if labels is not None:
            raise ArgumentError("labels", "None, as the data have their own", type(labels).__name__)
        data = matched(images, model.metadata.get("class_names"), model.config.num_classes, "images")
        images, labels = data.images, data.labels
    elif not isinstance(images, Tensor) or images.dtype != torch.uint8:
        got = short(images.dtype) if isinstance(images, Tensor) else type(images).__name__
        raise ArgumentError("images", "a uint8 tensor, or ImageData(images) for data that are no pictures", got)
    shape = model.config.data_shape
    if images.dim() != 4 or tuple(images.shape[1:]) != shape or images.shape[0] == 0:
        raise ArgumentError("images", f"shape (n >= 1, {', '.join(map(str, shape))})", tuple(images.shape))
    return images, labels


def _check_finite(values: Tensor) -> None:
    """values: (n, ...), one row an image."""
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad):
        raise TarFlowError(f"the density of image {int(bad[0, 0])} is not finite; evaluate it in float32")
