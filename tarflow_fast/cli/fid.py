"""`tarflow-fast fid` measures how far images are from a reference, by the features of Inception-v3."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .features import add_all, add_features, features_folder, own_device, run_folder
from .options import (
    BATCH,
    SIZE_OR_SIZES,
    Command,
    device_option,
    features_option,
    inception_option,
    json_option,
    load_inception,
    option,
    print_json,
    progress_option,
    quiet_option,
    show_progress,
)
from .outputs import output_path
from .terminal import echo

if TYPE_CHECKING:
    from ..evaluation import Extractor, FeatureSet, ImageSource
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
    aliases={"path": "IMAGES", "images": "IMAGES", "size": "--size", "out": "--features", "statistics": "--stats"},
    short_help="Measure the FID of images, or write their statistics.",
    epilog="""\b
Examples:
  tarflow-fast fid samples/ --stats afhq_256_fid_stats.pth
      The FID of the shards in samples/, which `tarflow-fast sample --out samples/` drew.
  tarflow-fast fid samples/ --reference photos/ --size 256 --all
      FID, sFID, Inception score, KID, precision and recall.
  tarflow-fast fid photos/ --size 256 --save photos.npz
      The statistics of a folder of pictures, to be given as --stats.
  torchrun --nproc-per-node 8 -m tarflow_fast fid photos/ --size 256 --stats photos.npz --features kept/
      The same by eight processes; however they end, the same command goes on.
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
@option(
    "--save",
    type=click.Path(),
    metavar="FILE",
    section="Output",
    help="Write the images' own statistics: a .npz, or a .pth for ml-tarflow's evaluate_fid.py.",
)
@option(
    "--size",
    type=SIZE_OR_SIZES,
    metavar="N|HxW",
    section="Images",
    help="Pixels along the sides that pictures of a folder get, cropped to the centre (bicubic); shards have theirs.",
)
@features_option
@inception_option("Machine")
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
    features: str | None,
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

    from ..evaluation import (
        SUFFIXES,
        FeatureSet,
        compute_measures,
        read_spatial_statistics,
        read_statistics,
        save_statistics,
    )
    from ..sampling.sharded import processes_of_environment

    out = None if save is None else output_path("--save", save, SUFFIXES)
    kept = features_folder(features, "images", "reference")
    statistics = None if stats is None else read_statistics(stats)
    spatial = None if stats is None or not everything else read_spatial_statistics(stats)
    paths = {"images": images_path} if reference is None else {"images": images_path, "reference": reference}
    readers = {name: _reader(name, path, size, kept) for name, path in paths.items()}
    place = own_device(device)
    extractor = load_inception(inception, place) if any(reader.source for reader in readers.values()) else None
    if out is not None and out.suffix.lower() == ".pth" and extractor is None:
        raise click.UsageError(
            "--save: a .pth has the network's weights, which a folder of features has not; give .npz"
        )

    started = time.perf_counter()
    sets = {name: FeatureSet(everything, like=statistics) for name in readers}
    for name, reader in readers.items():
        reader.add_to(sets[name], extractor, batch_size, bars)
    if processes_of_environment()[0] > 0:
        return  # the first of several processes goes on
    images = sets["images"]
    if out is not None:
        network = extractor.network if extractor is not None and out.suffix.lower() == ".pth" else None
        save_statistics(out, images.sums, network, images.spatial_gaussian())
    double = place if place.type == "cuda" else "cpu"  # mps has no fp64
    found = compute_measures(images, sets.get("reference"), statistics=statistics, spatial=spatial, device=double)
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


@dataclass(frozen=True)
class _Reader:
    """A `_Reader` gets the features of images.

    name: what they are. path: where they are. source: the images, or None where there are features in their place.
    folder: where their features are kept, if anywhere.
    """

    name: str
    path: str
    source: ImageSource | None
    folder: Path | None

    def add_to(self, found: FeatureSet, extractor: Extractor | None, batch_size: int, bars: bool) -> None:
        """Adds the features to those that were found, of several processes in the first one."""
        from ..evaluation import read_features
        from ..sampling.sharded import processes_of_environment

        if self.source is not None and extractor is not None:
            add_features(found, self.source, extractor, self.folder, batch_size=batch_size, bars=bars, desc=self.name)
        elif processes_of_environment()[0] == 0:
            add_all(found, read_features(self.path, batch_size))


def _reader(name: str, path: str, size: Size | None, kept: Path | None) -> _Reader:
    """Returns the reader of images, whose features, if they are kept, go into a folder of that name. Raises
    click.UsageError for a size that has no effect."""
    from ..evaluation import holds_features, open_images
    from ..sampling.sharded import is_run

    if is_run(path) and size is not None:
        raise click.UsageError("--size has no effect on shards")
    source = None if holds_features(path) else open_images(path, size)
    return _Reader(name, path, source, None if kept is None else run_folder("--features", kept / name))
