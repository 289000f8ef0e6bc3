"""`tarflow-fast prepare-stats` writes the statistics of a data folder, prepared as ml-tarflow prepares it."""

from __future__ import annotations

import time

import click

from .options import (
    BATCH,
    SEED,
    SIZE,
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


@click.command(
    "prepare-stats",
    cls=Command,
    aliases={"path": "DATA", "images": "DATA"},
    short_help="Write the statistics of data, for the FID.",
    epilog="""\b
Examples:
  tarflow-fast prepare-stats data/afhq --size 256 --out afhq_256.npz
  tarflow-fast fid samples/ --stats afhq_256.npz
""",
)
@click.argument("data", metavar="DATA", type=click.Path())
@option("--size", type=SIZE, metavar="N", required=True, section="Data", help="Pixels along the sides of an image.")
@option(
    "--seed", type=SEED, default=0, metavar="N", section="Data", help="Seed by which half of the images are mirrored."
)
@option("-o", "--out", type=click.Path(), metavar="FILE", required=True, section="Output", help="The file, a .npz.")
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
def prepare_stats_command(
    data: str,
    size: int,
    seed: int,
    out: str,
    inception: str | None,
    batch_size: int,
    device: str | None,
    progress: bool | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write the statistics of all pictures in the folder DATA and below, for `tarflow-fast fid --stats`.

    Pictures are prepared as ml-tarflow's prepare_fid_stats.py prepares them: the shorter side is brought to the size
    (bilinear), the middle is taken, and half of them, drawn at random, are mirrored. The file has mu and sigma of FID,
    mu_s and sigma_s of sFID.
    """
    bars = show_progress(progress, quiet)
    path = output_path("--out", out, (".npz",))

    from ..data import centre_crops, find_below
    from ..devices import pick_device
    from ..evaluation import FeatureSums, Inception
    from ..progress import Bar

    started, found = time.perf_counter(), find_below(data)
    extractor = Inception(inception, device=pick_device(device))
    sums: list[FeatureSums] = []
    with Bar(total=len(found), unit="image", desc="features", disable=not bars) as bar:
        for batch in centre_crops(found, size, batch_size, seed):
            features = extractor.features(batch)
            kinds = (features.pooled, features.spatial)
            sums = sums or [FeatureSums(kind.shape[1]) for kind in kinds]
            for total, kind in zip(sums, kinds, strict=True):
                total.add(kind)
            bar.update(len(batch))
    pooled, spatial = (total.gaussian() for total in sums)
    pooled.save(path, spatial)
    seconds = time.perf_counter() - started
    if as_json:
        print_json({"images": len(found), "size": size, "seed": seed, "saved": out, "seconds": seconds})
    elif not quiet:
        echo(f"{out}: statistics of {len(found)} images of {size}×{size}  ({seconds:.1f} s)")
