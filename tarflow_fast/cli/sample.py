"""`tarflow-fast sample` draws pictures from a model."""

from __future__ import annotations

import contextlib
import os
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from ..errors import TarFlowWarning
from ..limits import (
    MOST_ATTN_TEMP,
    MOST_GUIDANCE,
    MOST_NUMBER,
    MOST_SCALE,
    MOST_SIZE,
    MOST_TOL,
)
from ..sizes import Size, by
from .labels import MOST_LISTED, Chosen, choose, label_name
from .layout import MOST_ROWS, PER_CLASS, PIXELS, default_count, default_scale, layout
from .messages import in_flags
from .options import (
    BATCH,
    DTYPES,
    NOISE_STD,
    SEED,
    Command,
    device_option,
    json_option,
    load_model,
    model_options,
    option,
    pick_device,
    print_json,
    progress_option,
    quiet_option,
    show_progress,
    threads_option,
    torch_dtype,
)
from .outputs import Outputs, Run
from .terminal import echo

if TYPE_CHECKING:
    from torch import Tensor

    from ..models.tarflow import TarFlow
    from ..sampling.report import Report, Samples

# The shipped model is drawn from by these options unless told otherwise, other models without guidance. Images of all
# models are denoised, by the optimal step, where the checkpoint records the Gaussian noise that it was trained with.
SHIPPED: dict[str, Any] = {
    "guidance": 1.0,
    "annealed_guidance": False,
    "attn_temp": 1.0,
    "denoise_scale": 1.0,
}

GRID = "samples.png"  # the grid goes there unless --out tells

GUIDANCE_DETAILS = ("guide_what", "attn_temp", "annealed_guidance")
DENOISING_DETAILS = ("noise_std", "denoise_scale")


def drawing_rule(model: TarFlow, shipped: bool, given: dict[str, Any], labelled: bool) -> dict[str, Any]:
    """Returns guidance and denoising as arguments of `Sampler.sample`.

    given: the options, each None where it was not given. labelled: whether any image may have a class. Raises
    click.UsageError for an option without effect.
    """
    told = {name: value for name, value in given.items() if value is not None}
    known = {**SHIPPED, **told} if shipped else told
    steerable = labelled or told.get("attn_temp", 1) != 1
    if told.get("guidance") and not steerable:
        raise click.UsageError("--guidance has no effect without classes, unless --attn-temp differs from 1")
    noisy = "noise_std" in model.metadata and model.metadata.get("noise_type") != "uniform"
    rule: dict[str, Any] = {
        "guidance": known.get("guidance", 0.0) if steerable else 0.0,
        "denoise": known.get("denoise", noisy or "noise_std" in told),
    }
    for switch, needed, details in (
        ("guidance", "a --guidance above 0", GUIDANCE_DETAILS),
        ("denoise", "--denoise", DENOISING_DETAILS),
    ):
        for name in details:
            if rule[switch] and name in known:
                rule[name] = known[name]
            elif name in told:
                raise click.UsageError(f"--{name.replace('_', '-')} has no effect without {needed}")
    return rule


def check_sequences(outputs: Outputs, given: dict[str, Any]) -> None:
    """Raises click.UsageError where pictures of sequences are asked for."""
    for name in ("out", "singles", "gif"):
        if given[name] is not None:
            raise click.UsageError(f"--{name}: sequences make no picture; --npz writes them as numbers")
    if outputs.npz is None:
        raise click.UsageError("this model draws sequences, which make no picture: give --npz")


class Totals:
    """The `Totals` of a run sum up its batches."""

    def __init__(self) -> None:
        self._report: Report | None = None
        self._n = 0
        self._labels: list[Tensor] = []
        self._log_prob: list[Tensor] = []

    def add(self, part: Samples) -> None:
        self._n += len(part.images)
        if self._report is None:
            self._report = part.report
        else:
            self._report.merge(part.report)
        if part.labels is not None:
            self._labels.append(part.labels)
        if part.log_prob is not None:
            self._log_prob.append(part.log_prob.cpu())

    def facts(self) -> dict[str, Any]:
        """Returns what was done, in numbers."""
        report = self._report
        assert report is not None
        facts: dict[str, Any] = {
            "images": self._n,
            "images_per_second": self._n / (report.seconds + report.denoise_seconds),
            **report.to_dict(),
        }
        if self._labels:
            facts["labels"] = [label for part in self._labels for label in part.tolist()]
        if self._log_prob:
            facts["log_prob"] = [nats for part in self._log_prob for nats in part.tolist()]
        return facts


def summary_lines(facts: dict[str, Any], model: TarFlow, chosen: Chosen, rows: bool) -> list[str]:
    """Returns the lines that tell what was done. rows: whether each class has a row of the grid."""
    from ..flow import known_names

    size, names = by(model.config.img_size), known_names(model.metadata)
    what = f"images of {size}"
    if model.config.layout == "tokens":
        what = f"sequences of {model.config.num_patches} tokens of {model.config.token_dim} values"
    how = f"guidance {facts['guidance']:g}" if facts["guidance"] else "unguided"
    how += ", denoised" if facts["denoise"] else ""
    lines = [
        f"{', '.join(facts['files'].values())}: {facts['images']} {what}, {how}",
        f"{facts['seconds'] + facts['denoise_seconds']:.2f} s, {facts['images_per_second']:.3g} images/s, "
        f"{facts['tokens_per_second']:,.0f} tokens/s in batches of {facts['batch_size']}",
        f"backend {facts['backend']} ({facts['backend_reason']}), {facts['device']}, {facts['dtype']}, "
        f"{facts['solver']} solver",
    ]
    if facts["setup_seconds"] >= 0.01:
        lines.append(f"{facts['setup_seconds']:.2f} s of it to set up for this batch size: the next batch does without")
    blocks, most = facts["blocks"], model.config.num_patches - 1
    if any(block["window"] > 1 for block in blocks):
        passes = ", ".join(str(block["passes"]) for block in blocks)
        residual = max(block["residual"] for block in blocks)
        instead = f" instead of {most}" if sum(block["passes"] for block in blocks) < most * len(blocks) else ""
        lines.append(f"passes of each block: {passes}{instead}; residual at most {residual:.1e}")
    if rows and chosen.entries:
        lines.append("rows: " + ", ".join(label_name(y, names) for y in chosen.entries))
    elif chosen.described is not None:
        drawn = sorted(set(facts.get("labels", ())))
        few = f" ({', '.join(label_name(y, names) for y in drawn)})" if 0 < len(drawn) <= MOST_LISTED else ""
        lines.append(f"classes: {chosen.described}{few}")
    if facts["redrawn"]:
        lines.append("drawn again, not being finite: images " + ", ".join(map(str, facts["redrawn"])))
    if "log_prob" in facts:
        nats, when = facts["log_prob"], " before denoising" if facts["denoise"] else ""
        mean = sum(nats) / len(nats)
        lines.append(f"log p{when}: mean {mean:.1f} nats, from {min(nats):.1f} to {max(nats):.1f}")
    return lines


@click.command(
    "sample",
    cls=Command,
    aliases={"n": "-n", "path": "--model", "model": "--model"},
    short_help="Draw images and write them as a grid.",
    epilog="""\b
Examples:
  tarflow-fast sample
      A row of eight images for each class of the shipped model, in samples.png.
  tarflow-fast sample --labels "sneaker,ankle boot" -n 24 --seed 7 --out shoes.png
  tarflow-fast sample --guidance 0 --npz samples.npz
      Unguided samples, also as numbers, with the exact log-likelihood of each.
  tarflow-fast sample -m afhq_model_8_768_8_8_0.07.pth -n 16 --guidance 2 --dtype bfloat16
  tarflow-fast sample -m imagenet.safetensors -n 50000 --labels random --no-grid --npz fid.npz
      Samples of 1000 classes, each as likely.
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
    "numbers, 3 and 3-7 are names, #3 and #3-#7 class numbers; -1 is no class. LIST may also be all; none; random, "
    "each class as likely; or @FILE with one a line. Upper and lower case are alike.",
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
    "--guidance",
    type=click.FloatRange(0, MOST_GUIDANCE),
    metavar="W",
    section="How to draw",
    show_default=f"{SHIPPED['guidance']:g} for the shipped model, else 0",
    help="Weight of classifier-free guidance; 0 is none.",
)
@option(
    "--guide-what",
    type=click.Choice(["a", "b", "ab"]),
    section="How to draw",
    show_default="ab",
    help="Guide log-scales (a), shifts (b) or both.",
)
@option(
    "--attn-temp",
    type=click.FloatRange(0, MOST_ATTN_TEMP, min_open=True),
    metavar="T",
    section="How to draw",
    show_default="1",
    help="Temperature of attention in the branch that guidance leads away from.",
)
@option(
    "--annealed-guidance/--constant-guidance",
    default=None,
    section="How to draw",
    show_default="constant",
    help="Let guidance grow from token to token.",
)
@option(
    "--denoise/--no-denoise",
    default=None,
    section="How to draw",
    show_default="on if the checkpoint records it",
    help="Take off the Gaussian noise that the model was trained with (Tweedie).",
)
@option(
    "--noise-std",
    type=NOISE_STD,
    metavar="SIGMA",
    section="How to draw",
    show_default="as recorded",
    help="Level of the noise that --denoise takes off.",
)
@option(
    "--denoise-scale",
    type=click.FloatRange(0, MOST_SCALE),
    metavar="S",
    section="How to draw",
    show_default="1",
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
    metavar="FILE",
    section="Output",
    show_default=GRID,
    help="File of the grid, .png or .jpg; by default none with --npz where images are no pictures, having neither 1 "
    "nor 3 channels, or being sequences. A file of that name is replaced, here and below, when all images are drawn; a "
    "run that ends before puts what it has drawn into NAME.partial.png.",
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
    progress: bool | None,
    quiet: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Draw images from a model and write them as a grid.

    Without arguments: the shipped Fashion-MNIST model, a row of images for each class, in samples.png.
    """
    bars = show_progress(progress, quiet)
    outputs = Outputs.checked(None if no_grid else given["out"] or GRID, given["singles"], given["npz"], given["gif"])
    if no_grid and given["out"] is not None:
        raise click.UsageError("--out and --no-grid exclude each other")
    if not outputs.to_dict():
        raise click.UsageError("--no-grid leaves nothing to write: give --singles, --npz or --gif")
    device = pick_device(given["device"])
    sizes = {"patch_size": patch_size, "img_size": img_size, "in_channels": in_channels, "head_dim": head_dim}
    model = load_model(model_path, weights=weights, **sizes)
    sequences = model.config.layout == "tokens"
    if sequences:
        check_sequences(outputs, given)
    if (sequences or model.config.in_channels not in (1, 3)) and given["out"] is None and outputs.npz is not None:
        outputs = replace(outputs, grid=None)  # such images make no grid
    seed, first = given["seed"], given["first"]
    chosen = choose(labels, model, seed)
    n = default_count(chosen.entries, labels is not None) if count is None else count
    labelled = chosen.entries is None or any(label >= 0 for label in chosen.entries)
    rule = drawing_rule(model, shipped=model_path is None, given=given, labelled=labelled)

    from ..flow import known_names
    from ..sampling.sampler import Sampler

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
    sampler = Sampler(
        model,
        backend=given["backend"],
        device=device,
        dtype=torch_dtype(given["dtype"]),
        solver=given["solver"],
        tol=given["tol"],
        compile=given["compile"],
        probe=given["probe"],
        threads=given["threads"],
    )
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
    if given["denoise"] is None and not rule["denoise"] and not {"noise_type", "noise_std"} & model.metadata.keys():
        said = "does not record the noise of its training: images are as drawn, not denoised; --noise-std SIGMA does it"
        warnings.warn(f"{model_path}: {said}", TarFlowWarning, stacklevel=1)
    facts = {"files": outputs.to_dict(), **totals.facts(), "seed": seed, "first": first, **rule}
    if as_json:
        print_json(facts)
    elif not quiet:
        facts["backend_reason"] = in_flags(sample_command, facts["backend_reason"])
        echo(*summary_lines(facts, model, chosen, outputs.grid is not None and plan.classes is not None))
