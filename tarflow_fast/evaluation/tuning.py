"""Guidance and the denoising rate are tuned by the FID of images that are drawn from the same noise for each."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..checks import Count, check_count
from ..errors import ArgumentError, BackendError
from ..files import PathLike, check_path, replacing
from ..images import to_uint8
from ..limits import MOST_NUMBER
from ..sampling.labels import LabelsByNumber
from ..sampling.sampler import Sampler
from .fid import Extractor, FeatureSums, Gaussian, frechet_distance

DETAILS = ("guide_what", "attn_temp", "annealed_guidance")  # of guidance


@dataclass(frozen=True)
class TuningPoint:
    """A `TuningPoint` is the FID under one guidance and one denoising rate.

    Attributes:
        guidance: The weight of guidance.
        denoise_scale: The multiplier of the denoising step; 0 is none.
        fid: The Fréchet distance to the reference.
    """

    guidance: float
    denoise_scale: float
    fid: float


def tune(
    sampler: Sampler,
    extractor: Extractor,
    reference: Gaussian,
    n: Count,
    labels: LabelsByNumber = None,
    *,
    guidance: Sequence[float],
    denoise_scale: Sequence[float] = (0.0,),
    seed: Count = 0,
    batch_size: Count | None = None,
    noise_std: float | None = None,
    on_nonfinite: str = "raise",
    progress: Callable[[int], object] = lambda drawn: None,
    **details: Any,
) -> list[TuningPoint]:
    """Returns the FID of n images for each guidance with each denoising rate, in this order.

    Image i has the same noise and label for all of them (common random numbers), so that their FIDs differ by less
    chance than those of independent images; the bias of few images is about the same for all, too. For each guidance
    images are drawn once, and denoised once: x + s·(y − x) is what the rate s makes of an image x that rate 1 makes y.

    Args:
        sampler: The sampler.
        extractor: What makes features of images, an `Inception`.
        reference: The features of the reference.
        n: The number of images, a few thousand.
        labels: As in `Sampler.sample`.
        guidance: The weights of guidance, each >= 0.
        denoise_scale: The denoising rates, each >= 0; 0 alone if the model has no denoising.
        seed: As in `Sampler.sample`.
        batch_size: As in `Sampler.sample`.
        noise_std: As in `Sampler.sample`.
        on_nonfinite: As in `Sampler.sample`.
        progress: A function that is told how many images have just been drawn.
        details: guide_what, attn_temp and annealed_guidance, as in `Sampler.sample`, where there is guidance.

    Raises:
        ArgumentError: An argument has the wrong type or range, or would have no effect.
        NonFiniteError: As in `Sampler.sample`.
        OutOfMemoryError: A batch does not fit in memory.
    """
    n = check_count("n", n, 2, MOST_NUMBER)
    if unknown := sorted(details.keys() - DETAILS):
        raise ArgumentError("details", ", ".join(DETAILS), unknown[0])
    for name, values in {"guidance": guidance, "denoise_scale": denoise_scale}.items():
        if not values or len(set(values)) != len(values):
            raise ArgumentError(name, "at least one number, none of them twice", list(values))
    denoised = any(denoise_scale)
    how: dict[str, Any] = {"denoise": True, "noise_std": noise_std} if denoised else {}
    idle = {} if any(guidance) else dict(details)
    if noise_std is not None and not denoised:
        idle["noise_std"] = noise_std
    for name, value in idle.items():
        raise ArgumentError(name, "the default where all of what it goes with is 0, as it has no effect", repr(value))
    streams = [
        sampler.stream(
            n,
            labels,
            seed=seed,
            batch_size=batch_size,
            on_nonfinite=on_nonfinite,
            trajectory=denoised,  # which ends with the images before denoising
            guidance=weight,
            **(details if weight else {}),
            **how,
        )
        for weight in guidance  # all arguments are checked before the first image is drawn
    ]
    points = []
    for weight, stream in zip(guidance, streams, strict=True):
        sums: dict[float, FeatureSums] = {}
        with contextlib.closing(stream):
            for part in stream:
                x = part.images if part.trajectory is None else part.trajectory[-1]
                for rate in denoise_scale:
                    features = extractor(_at_rate(x, part.images, rate))
                    sums.setdefault(rate, FeatureSums(features.shape[1])).add(features)
                progress(len(x))
        points += [
            TuningPoint(weight, rate, frechet_distance(found.gaussian(), reference)) for rate, found in sums.items()
        ]
    return points


def _at_rate(x: Tensor, y: Tensor, rate: float) -> Tensor:
    """Returns 8-bit images of which x is at rate 0 and y at rate 1."""
    return to_uint8(x if rate == 0 else x + rate * (y - x))


def require_matplotlib() -> None:
    """Raises BackendError where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BackendError(
            "matplotlib, which draws the curve, is not installed; pip install 'tarflow_fast[fid]' brings it"
        )


def save_curve(points: Sequence[TuningPoint], path: PathLike) -> None:
    """Draws FID over guidance, a line for each denoising rate, into a PNG file, replacing it.

    Args:
        points: What `tune` returned.
        path: A file name that ends in `.png`, in an existing folder.

    Raises:
        ArgumentError: The path is not a place where such a file can be written.
        BackendError: matplotlib is not installed.
        OSError: The system refuses to write.
    """
    out = check_path("path", path, (".png",))
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for rate in dict.fromkeys(point.denoise_scale for point in points):
        line = sorted((point.guidance, point.fid) for point in points if point.denoise_scale == rate)
        axes.plot(*zip(*line, strict=True), marker="o", markersize=4, label=f"{rate:g}")
    best = min(points, key=lambda point: point.fid)
    axes.plot(best.guidance, best.fid, marker="*", markersize=14, color="black", linestyle="")
    axes.set(xlabel="guidance", ylabel="FID")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="denoising rate", frameon=False)
    with replacing(out) as partial:
        figure.savefig(partial, format="png", dpi=150)
