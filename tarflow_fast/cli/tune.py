"""`tarflow-fast tune` finds the guidance and the denoising rate at which a model's FID is the lowest."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import click

from ..limits import MOST_NUMBER
from .features import check_pictures, features_folder, own_device
from .labels import choose
from .options import (
    BATCH,
    DTYPES,
    SEED,
    Command,
    device_option,
    features_option,
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
    torch_dtype,
)
from .outputs import output_path
from .rule import GUIDANCE, SCALE, guidance_options, noise_std_option, records_noise
from .terminal import echo


class Numbers(click.ParamType):
    """A `Numbers` reads numbers between commas. each: the type of one."""

    name = "numbers"

    def __init__(self, each: click.ParamType):
        self.each = each

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(self.each.convert(text.strip(), param, ctx) for text in str(value).split(","))


@click.command(
    "tune",
    cls=Command,
    aliases={"n": "-n", "path": "--model", "model": "--model", "out": "--features", "statistics": "--stats"},
    short_help="Sweep guidance and denoising for the lowest FID.",
    epilog="""\b
Examples:
  tarflow-fast tune -m afhq.pth --stats afhq_256.npz --guidance 2,2.5,3,3.5 --denoise-scale 1,1.2,1.4 \\
      --out curve.json --plot curve.png --features kept/
      However it is stopped, the same command goes on.
""",
)
@model_options
@option(
    "-n",
    "count",
    type=click.IntRange(2, MOST_NUMBER),
    default=2000,
    metavar="N",
    section="What to draw",
    help="Number of images of each point.",
)
@option(
    "--labels",
    metavar="LIST",
    section="What to draw",
    show_default="random",
    help="Classes, as `tarflow-fast sample` takes them; the same for all points.",
)
@option("--seed", type=SEED, default=0, metavar="N", section="What to draw", help="Seed, the same for all points.")
@option(
    "--guidance",
    type=Numbers(GUIDANCE),
    default="0,0.5,1,1.5,2,3",
    metavar="LIST",
    section="How to draw",
    help="Weights of guidance.",
)
@option(
    "--denoise-scale",
    type=Numbers(SCALE),
    metavar="LIST",
    section="How to draw",
    show_default="0.8,1,1.2 if the model records its noise, else 0",
    help="Denoising rates, multipliers of the optimal step; 0 is none.",
)
@noise_std_option
@guidance_options
@option(
    "--stats",
    type=click.Path(),
    metavar="FILE",
    required=True,
    section="Reference",
    help="Statistics of the reference, as `tarflow-fast fid` takes them.",
)
@features_option
@inception_option("Machine")
@option("--backend", default="auto", metavar="NAME", section="Machine", help="Name of a backend.")
@device_option
@option("--dtype", type=click.Choice(DTYPES), section="Machine", show_default="float32", help="Dtype of the weights.")
@option("--solver", default="auto", metavar="NAME", section="Machine", help="auto, sequential or adaptive.")
@option(
    "--batch-size",
    type=BATCH,
    metavar="N",
    section="Machine",
    show_default="what fits in memory",
    help="Number of images drawn together.",
)
@option("-o", "--out", "target", type=click.Path(), metavar="FILE", section="Output", help="Write the curve, a .json.")
@option(
    "--plot", type=click.Path(), metavar="FILE", section="Output", help="Draw the curve, a .png (needs matplotlib)."
)
@progress_option
@quiet_option
@json_option
def tune_command(
    model_path: str | None,
    weights: str | None,
    count: int,
    labels: str | None,
    seed: int,
    guidance: tuple[float, ...],
    denoise_scale: tuple[float, ...] | None,
    noise_std: float | None,
    guide_what: str | None,
    attn_temp: float | None,
    annealed_guidance: bool | None,
    stats: str,
    features: str | None,
    inception: str | None,
    backend: str,
    device: str | None,
    dtype: str | None,
    solver: str,
    batch_size: int | None,
    target: str | None,
    plot: str | None,
    progress: bool | None,
    quiet: bool,
    as_json: bool,
    **sizes: Any,
) -> None:
    """Measure the FID of a model for each guidance with each denoising rate, and name the best.

    Image i has the same noise and label at each point, so that points differ by less chance than their images would
    let them. FIDs of few images are biased upwards, about as much at each point: draw 50,000 at the best for a FID to
    quote.
    """
    bars = show_progress(progress, quiet)
    files = {
        "--out": None if target is None else output_path("--out", target, (".json",)),
        "--plot": None if plot is None else output_path("--plot", plot, (".png",)),
    }

    from ..evaluation import read_statistics, require_matplotlib, save_curve, tune
    from ..progress import Bar
    from ..sampling.sampler import Sampler
    from ..sampling.sharded.job import write_json

    if plot is not None:
        require_matplotlib()
    kept = features_folder(features, "guidance-*")
    reference, place = read_statistics(stats), own_device(device)
    extractor = load_inception(inception, place)
    model = load_model(model_path, weights=weights, **sizes)
    check_pictures(model)
    if denoise_scale is None:
        denoise_scale = (0.8, 1.0, 1.2) if noise_std is not None or records_noise(model) else (0.0,)
    chosen = choose(labels or ("random" if model.config.num_classes else None), model, seed)
    sampler = Sampler(model, backend=backend, device=place, dtype=torch_dtype(dtype), solver=solver, probe="now")
    given = {"guide_what": guide_what, "attn_temp": attn_temp, "annealed_guidance": annealed_guidance}
    recorded = model.metadata.get("sampling", {}) if any(guidance) else {}
    details: dict[str, Any] = {
        name: recorded.get(name) if value is None else value
        for name, value in given.items()
        if value is not None or name in recorded
    }
    started = time.perf_counter()
    with Bar(total=count * len(guidance), unit="image", desc="tuning", disable=not bars) as bar:
        points = tune(
            sampler,
            extractor,
            reference,
            count,
            chosen.labels,
            guidance=guidance,
            denoise_scale=denoise_scale,
            seed=seed,
            batch_size=batch_size,
            noise_std=noise_std,
            out=kept,
            progress=bar.update,
            **details,
        )
    if not points:
        return  # the first of several processes goes on
    best = min(points, key=lambda point: point.fid)
    facts = {
        "images": count,
        "seed": seed,
        "labels": chosen.described,
        "points": [asdict(point) for point in points],
        "best": asdict(best),
    }
    if (path := files["--out"]) is not None:
        write_json(path, facts)
    if (path := files["--plot"]) is not None:
        save_curve(points, path)
    if as_json:
        print_json({**facts, "seconds": time.perf_counter() - started})
    elif not quiet:
        echo(f"FID of {count} images at each point; a row for each guidance, a column for each denoising rate")
        echo("        " + "".join(f"{rate:>10g}" for rate in denoise_scale))
        for i, weight in enumerate(guidance):
            row = points[i * len(denoise_scale) : (i + 1) * len(denoise_scale)]
            echo(f"{weight:>8g}" + "".join(f"{point.fid:>10.3f}" for point in row))
        echo(f"best: --guidance {best.guidance:g} with --denoise-scale {best.denoise_scale:g}, FID {best.fid:.3f}")
