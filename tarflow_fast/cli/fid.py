"""`tarflow-fast fid` measures how far images are from a reference, by the features of Inception-v3."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import (
    BATCH,
    SIZE_OR_SIZES,
    Command,
    device_option,
    json_option,
    option,
    print_json,
    progress_option,
    quiet_option,
    show_progress,
)
from .outputs import output_path
from .terminal import echo

if TYPE_CHECKING:
    from torch import Tensor

    from ..evaluation import Features, Inception
    from ..sizes import Size

LINES = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception score",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
}


@click.command(
    "fid",
    cls=Command,
    aliases={"path": "IMAGES", "images": "IMAGES", "size": "--size"},
    short_help="Measure the FID of images, or write their statistics.",
    epilog="""\b
Examples:
  tarflow-fast fid samples/ --stats afhq_256_fid_stats.pth
      The FID of the shards in samples/, which `tarflow-fast sample --out samples/` drew.
  tarflow-fast fid samples/ --reference photos/ --size 256 --all
      FID, sFID, Inception score, KID, precision and recall.
  tarflow-fast fid photos/ --size 256 --save photos.npz
      The statistics of a folder of pictures, to be given as --stats.
""",
)
@click.argument("images_path", metavar="IMAGES", type=click.Path())
@option(
    "--stats",
    type=click.Path(),
    metavar="FILE",
    section="Reference",
    help="Statistics of the reference: ml-tarflow's or GS-Jacobi's *_fid_stats.pth, or a .npz with mu and sigma, as "
    "ADM's references are and --save writes.",
)
@option(
    "--reference",
    type=click.Path(),
    metavar="IMAGES",
    section="Reference",
    help="Images of the reference, as IMAGES; --stats, where given, serves for its statistics.",
)
@option(
    "--all",
    "everything",
    is_flag=True,
    section="Output",
    help="Also print the Inception score; sFID, where --stats has mu_s and sigma_s, as ADM's has, or with --reference; "
    "and with --reference KID, precision and recall. That holds 12 KB an image in memory. --save keeps mu_s and "
    "sigma_s.",
)
@option("--save", type=click.Path(), metavar="FILE", section="Output", help="Write the images' own statistics, a .npz.")
@option(
    "--size",
    type=SIZE_OR_SIZES,
    metavar="N|HxW",
    section="Images",
    help="Pixels along the sides that pictures of a folder get, cropped to the centre (bicubic); shards have theirs.",
)
@option(
    "--inception",
    type=click.Path(),
    metavar="FILE",
    section="Machine",
    show_default="torch-fidelity's cache",
    help="torch-fidelity's file of the weights of Inception-v3.",
)
@option("--batch-size", type=BATCH, default=64, metavar="N", section="Machine", help="Number of images in one pass.")
@device_option
@progress_option
@quiet_option
@json_option
def fid_command(
    images_path: str,
    stats: str | None,
    reference: str | None,
    everything: bool,
    save: str | None,
    size: Size | None,
    inception: str | None,
    batch_size: int,
    device: str | None,
    progress: bool | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Measure the Fréchet distance between IMAGES and a reference, by the features of Inception-v3 (FID).

    IMAGES is a folder of shards that `tarflow-fast sample --out FOLDER` drew, of images or, with --shards features, of
    their features; or what `train --data` takes. Features are torch-fidelity's (the extra `fid`), sums are fp64. FIDs
    of less than 50,000 images are biased upwards.
    """
    bars = show_progress(progress, quiet)
    if stats is None and reference is None and save is None and not everything:
        raise click.UsageError("nothing to do: give --stats, --reference, --all or --save")
    out = None if save is None else output_path("--save", save, (".npz",))

    from ..devices import pick_device
    from ..evaluation import FeatureSet, Inception, compute_measures, read_spatial_statistics, read_statistics
    from ..progress import Bar

    statistics = None if stats is None else read_statistics(stats)
    spatial = None if stats is None or not everything else read_spatial_statistics(stats)
    place = pick_device(device)
    extractor = functools.cache(lambda: Inception(inception, device=place))
    started = time.perf_counter()

    def collected(path: str, desc: str) -> FeatureSet:
        found = FeatureSet(keep=everything)
        with Bar(unit="image", desc=desc, disable=not bars) as bar:
            for part in _features(path, size, batch_size, extractor):
                found.add(part)
                bar.update(len(part))
        return found

    images = collected(images_path, "features")
    other = None if reference is None else collected(reference, "reference")
    if out is not None:
        images.gaussian().save(out, images.spatial_gaussian())
    double = place if place.type == "cuda" else "cpu"  # mps has no fp64
    found = compute_measures(images, other, statistics=statistics, spatial=spatial, device=double)
    seconds = time.perf_counter() - started
    if as_json:
        print_json({"images": images.n, "fid": None, **found, "saved": save, "seconds": seconds})
    elif not quiet:
        about = f"  ({images.n} images; {seconds:.1f} s)"
        for name, title in LINES.items():
            if name in found:
                spread = f" ± {found[f'{name}_std']:.4g}" if f"{name}_std" in found else ""
                value = f"{found[name]:.3e}" if name == "kid" else f"{found[name]:.4f}"
                echo(f"{title}  {value}{spread}{about}")
                about = ""
        if save is not None:
            echo(f"{save}: statistics of {images.n} images")


def _features(path: str, size: Size | None, batch_size: int, extractor: Callable[[], Inception]) -> Iterator[Features]:
    """Yields the features of images, batch by batch. extractor: gives the network, where features are not there yet."""
    from ..evaluation import holds_features, read_features

    if holds_features(path):
        if size is not None:
            raise click.UsageError("--size has no effect on shards")
        yield from read_features(path)
        return
    for batch in _batches(path, size, batch_size):
        yield extractor().features(batch)


def _batches(path: str, size: Size | None, batch_size: int) -> Iterator[Tensor]:
    """Yields the images (B, ch, H, W) uint8 of a folder of shards, or of other data."""
    from ..data import load_images
    from ..sampling.sharded import read_shards
    from ..sampling.sharded.job import JOB

    if (Path(path) / JOB).is_file():
        if size is not None:
            raise click.UsageError("--size has no effect on shards")
        yield from read_shards(path, batch_size)
        return
    images = load_images(path, size=size).images
    if images.is_floating_point():
        raise click.UsageError(f"IMAGES: expected pictures, got other data in {path!r}")
    yield from images.split(batch_size)
