"""`tarflow-fast sample` draws pictures from a model."""

from __future__ import annotations

import contextlib
import functools
import os
from dataclasses import replace
from typing import Any

import click

from ..limits import MOST_NUMBER, MOST_SIZE, MOST_TOL
from ..sizes import Size
from .families import holds_family, sample_family, sample_lines
from .features import check_pictures, own_device, run_folder
from .labels import choose
from .layout import MOST_ROWS, PER_CLASS, PIXELS, default_count, default_scale, layout
from .messages import in_flags
from .options import (
    BATCH,
    DTYPES,
    SEED,
    Command,
    device_option,
    inception_option,
    json_option,
    load_inception,
    load_model,
    model_options,
    option,
    print_json,
    progress_option,
    quiet_option,
    show_progress,
    threads_option,
    torch_dtype,
)
from .outputs import Outputs, Run
from .recipes import RECIPES, recipe_line, with_recipe
from .rule import GUIDANCE, SCALE, drawing_rule, guidance_options, noise_std_option, warn_undenoised
from .shards import FORMATS, check_options, draw_shards, wants_shards
from .summary import Totals, summary_lines
from .terminal import echo

GRID = "samples.png"  # the grid goes there unless --out tells


def check_sequences(outputs: Outputs, given: dict[str, Any]) -> None:
    """Raises click.UsageError where pictures of sequences are asked for."""
    for name in ("out", "singles", "gif"):
        if given[name] is not None:
            raise click.UsageError(f"--{name}: sequences make no picture; --npz writes them as numbers")
    if outputs.npz is None:
        raise click.UsageError("this model draws sequences, which make no picture: give --npz")


@click.command(
    "sample",
    cls=Command,
    aliases={"n": "-n", "path": "--model", "model": "--model", "format": "--shards"},
    short_help="Draw images and write them as a grid.",
    epilog="""\b
Examples:
  tarflow-fast sample
      A row of eight images for each class of the shipped model, in samples.png.
  tarflow-fast sample --labels "sneaker,ankle boot" -n 24 --seed 7 --out shoes.png
  tarflow-fast sample --guidance 0 --npz samples.npz
      Unguided samples, also as numbers, with the exact log-likelihood of each.
  tarflow-fast sample -m afhq_model_8_768_8_8_0.07.pth -n 16 --guidance 2 --dtype bfloat16
  torchrun --nproc-per-node 8 -m tarflow_fast sample -m imagenet.safetensors -n 50000 --labels random --out fid
      Samples of 1000 classes, each as likely, in the folder fid, drawn by 8 processes.
  torchrun --nproc-per-node 8 -m tarflow_fast sample --recipe afhq256 -m afhq.pth --shards features --out afhq
      The features of 50,000 images, from which `tarflow-fast fid afhq --stats FILE` has the FID.
  tarflow-fast sample -n 1000 --first 5000 --singles images/ --quiet
      Images number 5000 to 5999 of seed 0, one file each: what -n 6000 draws last.
""",
)
@model_options
@option(
    "-n",
    "count",
    type=click.IntRange(1, MOST_NUMBER),
    metavar="N",
    section="What to draw",
    show_default=f"{PER_CLASS} of each of up to {MOST_ROWS} classes, else {PER_CLASS**2}",
    help="Number of images.",
)
@option(
    "--labels",
    metavar="LIST",
    section="What to draw",
    show_default="all",
    help='Classes, which images take in turn by their number: names or numbers, "bag,coat" or "0,3-7". Where names are '
    "numbers, 3 and 3-7 are names, #3 and #3-#7 class numbers; -1 is no class. LIST may also be all or balanced; none; "
    "random, each class as likely; @FILE with one a line; or @FILE.npz, whose array labels or arr_1 has one for each "
    "image. Upper and lower case are alike.",
)
@option(
    "--seed",
    type=SEED,
    default=0,
    metavar="N",
    section="What to draw",
    help="Seed of the noise; that of image number i depends on the seed and i alone.",
)
@option(
    "--first",
    type=click.IntRange(0, MOST_NUMBER - 1),
    default=0,
    metavar="N",
    section="What to draw",
    help="Number of the first image, to go on where another run stopped. Noise and labels depend on the number.",
)
@option(
    "--recipe",
    type=click.Choice(list(RECIPES)),
    section="How to draw",
    help="Draw as a published FID was: labels, guidance, denoising, batch size, and with --out FOLDER the number of "
    "images. Options that are given beside it win.",
)
@option(
    "--guidance",
    type=GUIDANCE,
    metavar="W",
    section="How to draw",
    show_default="as the model records, else 0",
    help="Weight of classifier-free guidance; 0 is none.",
)
@guidance_options
@option(
    "--denoise/--no-denoise",
    default=None,
    section="How to draw",
    show_default="as the model records, else on if it records the noise",
    help="Take off the Gaussian noise that the model was trained with (Tweedie).",
)
@noise_std_option
@option(
    "--denoise-scale",
    type=SCALE,
    metavar="S",
    section="How to draw",
    show_default="as the model records, else 1",
    help="Multiplier of the optimal denoising step.",
)
@option(
    "--on-nonfinite",
    type=click.Choice(["raise", "redraw"]),
    default="raise",
    section="How to draw",
    help="What to do about an image with infinities or NaNs: fail, or draw it again.",
)
@option(
    "--backend",
    default="auto",
    metavar="NAME",
    section="Machine",
    help="Name of a backend; `tarflow-fast info` lists them.",
)
@device_option
@option(
    "--dtype",
    type=click.Choice(DTYPES),
    section="Machine",
    show_default="float32",
    help="Dtype of weights and KV cache.",
)
@option(
    "--solver",
    default="auto",
    metavar="NAME",
    section="Machine",
    help="Solver of the blocks: auto (the quickest for each block), sequential (exact) or adaptive.",
)
@option(
    "--tol",
    type=click.FloatRange(0, MOST_TOL),
    default=None,
    metavar="X",
    section="Machine",
    help="How far a token may still move when a parallel pass takes it as final, on the scale -1 to 1.",
)
@option("--compile", is_flag=True, section="Machine", help="Run the torch backend under torch.compile.")
@option(
    "--probe",
    type=click.Choice(["background", "now", "never"]),
    default="background",
    section="Machine",
    help="When backends of a GPU that are not known there have to prove themselves; see `tarflow-fast check`.",
)
@threads_option
@option(
    "--batch-size",
    type=BATCH,
    metavar="N",
    section="Machine",
    show_default="what fits in memory",
    help="Number of images drawn together.",
)
@option(
    "-o",
    "--out",
    type=click.Path(),
    metavar="FILE|FOLDER",
    section="Output",
    show_default=GRID,
    help="File of the grid, .png or .jpg, or a folder for shards (below); by default none with --npz where images are "
    "no pictures, having neither 1 nor 3 channels, or being sequences. A file of that name is replaced, here and "
    "below, when all images are drawn; a run that ends before puts what it has drawn into NAME.partial.png.",
)
@option("--no-grid", is_flag=True, section="Output", help="Write no grid, but the files below alone.")
@option(
    "--columns",
    type=click.IntRange(1, MOST_SIZE),
    metavar="N",
    section="Output",
    show_default="a row for each class",
    help="Number of images in a row of the grid.",
)
@option(
    "--scale",
    type=click.IntRange(1, MOST_SIZE),
    metavar="N",
    section="Output",
    show_default=f"small images to about {PIXELS} pixels",
    help="Enlarge each pixel of grid and GIF to N×N.",
)
@option(
    "--singles",
    type=click.Path(file_okay=False),
    metavar="DIR",
    section="Output",
    help="Also write every image, at its own size, to DIR/<number>.png, as soon as its batch is drawn.",
)
@option(
    "--npz",
    type=click.Path(),
    metavar="FILE",
    section="Output",
    help="Also write numbers: images (n,ch,H,W) float32, about -1 to 1, or sequences (n,T,D); seed; first; options; "
    "labels; class_names; and log_prob (nats, before denoising) if unguided.",
)
@option(
    "--gif",
    type=click.Path(),
    metavar="FILE",
    section="Output",
    help="Also write an animation: noise, then the images after each block.",
)
@option(
    "--shards",
    type=click.Choice(FORMATS),
    section="Many images",
    show_default="npz",
    help="What --out FOLDER gets: npz, arr_0 (n,H,W,ch) uint8 and arr_1 labels as ADM's evaluation suite reads them; "
    "png, images/CLASS/NUMBER.png; tar, for WebDataset; features, what `tarflow-fast fid FOLDER` needs of the images, "
    "in their place. If unguided, log_prob is beside images. Any number of processes may run the same command, by "
    "torchrun or on machines that share FOLDER; however they end, it goes on.",
)
@inception_option("Many images", ", for --shards features")
@option(
    "--shard-size",
    type=click.IntRange(1, MOST_NUMBER),
    metavar="N",
    section="Many images",
    show_default="1024",
    help="Number of images in a shard.",
)
@option(
    "--dry-run",
    is_flag=True,
    section="Many images",
    help="Draw one batch and print what the whole will take: time, memory, disk.",
)
@progress_option
@quiet_option
@json_option
def sample_command(
    model_path: str | None,
    weights: str | None,
    patch_size: Size | None,
    img_size: Size | None,
    in_channels: int | None,
    head_dim: int | None,
    count: int | None,
    labels: str | None,
    columns: int | None,
    scale: int | None,
    no_grid: bool,
    recipe: str | None,
    progress: bool | None,
    quiet: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Draw images from a model and write them as a grid.

    Without arguments: the shipped Fashion-MNIST model, a row of images for each class, in samples.png.
    """
    bars = show_progress(progress, quiet)
    if holds_family(model_path):
        which = {"weights": weights, "patch_size": patch_size, "img_size": img_size, "in_channels": in_channels}
        which |= {"head_dim": head_dim, "columns": columns, "scale": scale, "recipe": recipe}
        family_facts = sample_family(str(model_path), count, labels, no_grid, {**given, **which})
        if as_json:
            print_json(family_facts)
        elif not quiet:
            echo(*sample_lines(family_facts))
        return
    check_options({**given, "columns": columns, "scale": scale})
    if no_grid and given["out"] is not None:
        raise click.UsageError("--out and --no-grid exclude each other")
    folder = run_folder("--out", given["out"]) if wants_shards(given) else None
    if folder is not None:
        given["out"] = None
    outputs = Outputs.checked(None if no_grid else given["out"] or GRID, given["singles"], given["npz"], given["gif"])
    if not outputs.to_dict():
        raise click.UsageError("--no-grid leaves nothing to write: give --singles, --npz or --gif")

    device = own_device(given["device"])
    network = load_inception(given["inception"], device) if given["shards"] == "features" else None
    from ..checks import environment_count

    sizes = {"patch_size": patch_size, "img_size": img_size, "in_channels": in_channels, "head_dim": head_dim}
    model = load_model(model_path, weights=weights, **sizes)
    if recipe is not None:
        told = with_recipe(recipe, {**given, "count": count, "labels": labels}, model)
        if folder is None:
            told["count"] = count
        if not (quiet or as_json or environment_count("RANK", 0, 0)):
            echo(recipe_line(recipe, told))
        count, labels = (told.pop(name) for name in ("count", "labels"))
        given = told
    if given["shards"] == "features":
        check_pictures(model)
    sequences = model.config.layout == "tokens"
    if sequences and folder is None:
        check_sequences(outputs, given)
    if (sequences or model.config.in_channels not in (1, 3)) and given["out"] is None and outputs.npz is not None:
        outputs = replace(outputs, grid=None)  # such images make no grid
    seed, first = given["seed"], given["first"]
    chosen = choose(labels, model, seed)
    n = default_count(chosen.entries, labels is not None) if count is None else count
    labelled = chosen.entries is None or any(label >= 0 for label in chosen.entries)
    rule = drawing_rule(model, given, labelled)

    from ..flow import known_names
    from ..sampling.sampler import Sampler

    make_sampler = functools.partial(
        Sampler,
        model,
        backend=given["backend"],
        device=device,
        dtype=torch_dtype(given["dtype"]),
        solver=given["solver"],
        tol=given["tol"],
        compile=given["compile"],
        threads=given["threads"],
    )
    if folder is not None:
        # what serves must not depend on when a probe in the background is done
        sampler = make_sampler(probe="never" if given["probe"] == "never" else "now")
        draw_shards(sampler, folder, n, chosen, given, rule, network=network, bars=bars, quiet=quiet, as_json=as_json)
        warn_undenoised(model_path, model, given, rule)
        return
    run = Run(
        n,
        first,
        plan := layout(n, chosen.entries, columns),
        scale or (1 if sequences else default_scale(*plan.size(first, n), *model.config.image_size)),
        {
            "model": "fashion_mnist" if model_path is None else os.path.basename(model_path),
            "seed": seed,
            "options": {**rule, **{name: given[name] for name in ("dtype", "backend", "solver", "tol")}},
        },
        known_names(model.metadata),
    )
    outputs.check(run, model.config.data_shape, model.config.num_blocks + 1 + rule["denoise"])
    sampler = make_sampler(probe=given["probe"])
    stream = sampler.stream(
        n,
        chosen.labels,
        seed=seed,
        first=first,
        trajectory=outputs.gif is not None,
        batch_size=given["batch_size"],
        on_nonfinite=given["on_nonfinite"],
        progress=bars,
        **rule,
    )
    totals = Totals()
    with outputs.writing(run) as writing, contextlib.closing(stream):
        for part in stream:
            writing.add(part)
            totals.add(part)
    warn_undenoised(model_path, model, given, rule)
    facts = {"files": outputs.to_dict(), **totals.facts(), "seed": seed, "first": first, **rule}
    if as_json:
        print_json(facts)
    elif not quiet:
        facts["backend_reason"] = in_flags(sample_command, facts["backend_reason"])
        echo(*summary_lines(facts, model, chosen, outputs.grid is not None and plan.classes is not None))
