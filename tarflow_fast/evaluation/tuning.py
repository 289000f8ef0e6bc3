"""Guidance and the denoising rate are tuned by the FID of images that are drawn from the same noise for each."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks import Count, check_count
from ..errors import ArgumentError, BackendError
from ..files import PathLike, check_path, replacing
from ..limits import MOST_NUMBER
from ..sampling.labels import LabelsByNumber
from ..sampling.sampler import Sampler
from ..sampling.sharded import draw_shards, processes_of_environment
from .fid import Extractor, FeatureSums, Gaussian, frechet_distance
from .rate_shards import Rates

SHARD_SIZE = 256  # images, the most that a stop loses of each process
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
    out: PathLike | None = None,
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
        out: A folder in which the features of the images are kept, if they are to be: a new or empty one, or that of
            the same call. However that is stopped, it then goes on; any number of processes, by RANK and WORLD_SIZE of
            the environment, divide the images; and what is there of a guidance serves another call that has it.
        progress: A function that is told how many images have just been drawn, or are there.
        details: guide_what, attn_temp and annealed_guidance, as in `Sampler.sample`, where there is guidance.

    Returns:
        The points; of several processes only the first has any.

    Raises:
        ArgumentError: An argument has the wrong type or range, or would have no effect; or the folder holds something
            else.
        NonFiniteError: As in `Sampler.sample`.
        OSError: The system refuses to write.
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
    rates = Rates(list(denoise_scale), extractor, reference)
    points = []
    for weight, stream in zip(guidance, streams, strict=True):
        if out is None:
            found = _drawn(stream, rates, progress)
        else:
            folder = Path(out) / f"guidance-{float(weight)!r}"
            rule = {"guidance": weight, "on_nonfinite": on_nonfinite, **(details if weight else {}), **how}
            found = _kept(sampler, folder, n, labels, rates, rule, progress, seed=seed, batch_size=batch_size)
        if processes_of_environment()[0] == 0:
            points += [
                TuningPoint(weight, rate, frechet_distance(sums.gaussian(), reference))
                for rate, sums in zip(rates.rates, found, strict=True)
            ]
    return points


def _drawn(stream: Any, rates: Rates, progress: Callable[[int], object]) -> list[FeatureSums]:
    """Returns the sums of the features of images at each rate, as they are drawn."""
    sums: list[FeatureSums] = []
    with contextlib.closing(stream):
        for part in stream:
            features = rates.features(part)
            sums = sums or [FeatureSums(each.shape[1]) for each in features]
            for total, each in zip(sums, features, strict=True):
                total.add(each)
            progress(len(part.images))
    return sums


def _kept(
    sampler: Sampler,
    folder: Path,
    n: int,
    labels: LabelsByNumber,
    rates: Rates,
    rule: dict[str, Any],
    progress: Callable[[int], object],
    **how: Any,
) -> list[FeatureSums]:
    """Returns the sums of the features of images at each rate, which are kept in a folder."""
    drawn = 0

    def told(count: int) -> None:
        nonlocal drawn
        drawn += count
        progress(count)

    format = rates.format(bool(rule.get("denoise")), told)
    draw_shards(sampler, folder, n, labels, format=format, shard_size=SHARD_SIZE, **how, **rule)
    progress(n - drawn)  # those that were there, or that other processes have drawn
    return rates.read(folder)


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
