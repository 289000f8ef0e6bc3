"""`tarflow-fast prepare-stats` writes the statistics of a data folder, prepared as ml-tarflow prepares it."""

from __future__ import annotations

import time

import click

from .features import add_features, features_folder, own_device
from .options import (
    BATCH,
    SEED,
    SIZE,
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


@click.command(
    "prepare-stats",
    cls=Command,
    aliases={"path": "DATA", "images": "DATA", "out": "--features"},
    short_help="Write the statistics of data, for the FID.",
    epilog="""\b
Examples:
  tarflow-fast prepare-stats data/afhq --size 256 --out afhq_256.npz
  tarflow-fast fid samples/ --stats afhq_256.npz
  torchrun --nproc-per-node 8 -m tarflow_fast prepare-stats data/afhq --size 256 --out afhq_256.npz --features kept/
      The same by eight processes; however they end, the same command goes on.
""",
)
@click.argument("data", metavar="DATA", type=click.Path())
@option("--size", type=SIZE, metavar="N", required=True, section="Data", help="Pixels along the sides of an image.")
@option(
    "--seed", type=SEED, default=0, metavar="N", section="Data", help="Seed by which half of the images are mirrored."
)
@option(
    "-o",
    "--out",
    "target",
    type=click.Path(),
    metavar="FILE",
    required=True,
    section="Output",
    help="The file: a .npz, or a .pth for ml-tarflow's evaluate_fid.py.",
)
@features_option
@inception_option("Machine")
@option("--batch-size", type=BATCH, default=64, metavar="N", section="Machine", help="Number of images in one pass.")
@device_option
@progress_option
@quiet_option
@json_option
def prepare_stats_command(
    data: str,
    size: int,
    seed: int,
    target: str,
    features: str | None,
    inception: str | None,
    batch_size: int,
    device: str | None,
    progress: bool | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write the statistics of all pictures in the folder DATA and below, for `tarflow-fast fid --stats`.

    Pictures are prepared as ml-tarflow's prepare_fid_stats.py prepares them: the shorter side is brought to the size
    (bilinear), the middle is taken, and half of them, drawn at random, are mirrored. A .npz has mu and sigma of FID,
    mu_s and sigma_s of sFID; a .pth is that script's own file, with FID's sums and the weights of Inception-v3.
    """
    bars = show_progress(progress, quiet)

    from ..evaluation import SUFFIXES, FeatureSet, save_statistics, training_images
    from ..sampling.sharded import processes_of_environment

    path, kept = output_path("--out", target, SUFFIXES), features_folder(features)
    source = training_images(data, size, seed)
    extractor = load_inception(inception, own_device(device))
    started, found = time.perf_counter(), FeatureSet(spatial=True)
    add_features(found, source, extractor, kept, batch_size=batch_size, bars=bars, desc="features")
    if processes_of_environment()[0] > 0:
        return  # the first of several processes goes on
    network = extractor.network if path.suffix.lower() == ".pth" else None
    save_statistics(path, found.sums, network, found.spatial_gaussian())
    seconds = time.perf_counter() - started
    if as_json:
        print_json({"images": found.n, "size": size, "seed": seed, "saved": target, "seconds": seconds})
    elif not quiet:
        echo(f"{target}: statistics of {found.n} images of {size}×{size}  ({seconds:.1f} s)")
