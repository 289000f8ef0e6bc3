"""`tarflow-fast sample`: pictures from a model."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from ..errors import TarFlowWarning
from .options import (
    DTYPES,
    Command,
    class_labels,
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
from .outputs import Outputs

if TYPE_CHECKING:
    from ..model import TarFlow
    from ..report import Samples

# How the shipped model is drawn from unless told otherwise. For other models: no guidance. For all: denoising
# with the optimal step where the checkpoint records the Gaussian noise that it was trained with.
SHIPPED: dict[str, Any] = {
    "guidance": 1.0,
    "annealed_guidance": False,
    "attn_temp": 1.0,
    "denoise_scale": 1.0,
}

PER_CLASS = 8  # images of each class, unless -n tells
MOST_CLASSES = 10  # classes shown, unless --labels tells
PIXELS = 96  # pictures of smaller images are enlarged towards this side

GUIDANCE_DETAILS = ("guide_what", "attn_temp", "annealed_guidance")
DENOISING_DETAILS = ("noise_std", "denoise_scale")


@dataclass(frozen=True)
class Layout:
    """How many images, of which classes, and how they lie in the grid.

    labels: image i takes entry i mod len(labels); None: no classes. columns: images in a row of the grid.
    rows: the class of each row, where every row is of one class.
    """

    n: int
    labels: list[int] | None
    columns: int
    rows: list[int] | None = None


def layout(model: TarFlow, n: int | None, labels: str | None, columns: int | None, first: int) -> Layout:
    """A row for each class where there are more images than classes, else a square with one image a class."""
    chosen = list(range(min(model.config.num_classes, MOST_CLASSES)))
    if labels is not None:
        chosen = class_labels(labels, model)
    if n is None:
        n = PER_CLASS * len(chosen) if chosen else PER_CLASS**2
    if n <= len(chosen) or not chosen:
        return Layout(n, chosen or None, columns or math.ceil(math.sqrt(n)))
    each = math.ceil(n / len(chosen))
    cycle = [label for label in chosen for _ in range(each)]
    one_class_a_row = columns in (None, each) and first % len(cycle) == 0
    return Layout(n, cycle, columns or each, chosen if one_class_a_row else None)


def drawing_rule(model: TarFlow, shipped: bool, given: dict[str, Any]) -> dict[str, Any]:
    """Guidance and denoising, as arguments of `Sampler.sample`. An option without effect is wrong usage."""
    told = {name: value for name, value in given.items() if value is not None}
    known = {**SHIPPED, **told} if shipped else told
    noisy = "noise_std" in model.metadata and model.metadata.get("noise_type") != "uniform"
    rule: dict[str, Any] = {
        "guidance": known.get("guidance", 0.0),
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


def summary(samples: Samples, outputs: Outputs) -> dict[str, Any]:
    """What was done, as numbers."""
    n, report = len(samples.images), samples.report
    facts: dict[str, Any] = {
        "files": outputs.to_dict(),
        "images": n,
        "images_per_second": n / (report.seconds + report.denoise_seconds),
        **report.to_dict(),
    }
    if samples.labels is not None:
        facts["labels"] = samples.labels.tolist()
    if samples.log_prob is not None:
        facts["log_prob"] = samples.log_prob.tolist()
    return facts


def summary_lines(facts: dict[str, Any], model: TarFlow, plan: Layout) -> list[str]:
    size, names = model.config.img_size, model.metadata.get("class_names")
    how = f"guidance {facts['guidance']:g}" if facts["guidance"] else "unguided"
    how += ", denoised" if facts["denoise"] else ""
    lines = [
        f"{', '.join(facts['files'].values())}: {facts['images']} images of {size}×{size}, {how}",
        f"{facts['seconds'] + facts['denoise_seconds']:.2f} s, {facts['images_per_second']:.3g} images/s, "
        f"{facts['tokens_per_second']:,.0f} tokens/s in batches of {facts['batch_size']}",
        f"backend {facts['backend']} ({facts['backend_reason']}), {facts['device']}, {facts['dtype']}, "
        f"{facts['solver']} solver",
    ]
    if facts["setup_seconds"] >= 0.01:
        lines.append(f"{facts['setup_seconds']:.2f} s of it to set up for this batch size: the next batch does without")
    blocks = facts["blocks"]
    if any(block["window"] > 1 for block in blocks):
        lines.append(
            f"passes of each block: {', '.join(str(block['passes']) for block in blocks)} instead of "
            f"{model.config.num_patches - 1}; residual at most {max(block['residual'] for block in blocks):.1e}"
        )
    if plan.rows is not None and names:
        lines.append("rows: " + ", ".join("no class" if y < 0 else names[y] for y in plan.rows))
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
    short_help="Draw images and write them as a grid.",
    epilog="""\b
Examples:
  tarflow-fast sample
      A row of eight images for each class of the shipped model, in samples.png.
  tarflow-fast sample --labels "sneaker,ankle boot" -n 24 --seed 7 --out shoes.png
  tarflow-fast sample --guidance 0 --npz samples.npz
      Unguided samples, also as numbers, with the exact log-likelihood of each.
  tarflow-fast sample -m afhq_model_8_768_8_8_0.07.pth -n 16 --guidance 2 --dtype bfloat16
  tarflow-fast sample -n 1000 --first 5000 --singles images/ --quiet
      Images number 5000 to 5999 of seed 0, one file each.
""",
)
@model_options
@option(
    "-n",
    "count",
    type=click.IntRange(1),
    metavar="N",
    section="What to draw",
    show_default=f"{PER_CLASS} of each class, {PER_CLASS**2} without classes",
    help="How many images.",
)
@option(
    "--labels",
    metavar="LIST",
    section="What to draw",
    show_default=f"all, but at most the first {MOST_CLASSES}",
    help='Classes, by number or name: "0,3,7" or "bag,coat"; -1 is no class.',
)
@option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    section="What to draw",
    help="The noise of image number i depends on the seed and i alone.",
)
@option(
    "--first",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    section="What to draw",
    help="Number of the first image: go on where another run stopped.",
)
@option(
    "--guidance",
    type=click.FloatRange(0),
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
    type=click.FloatRange(0, min_open=True),
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
    type=click.FloatRange(0, min_open=True),
    metavar="SIGMA",
    section="How to draw",
    show_default="as recorded",
    help="Level of that noise.",
)
@option(
    "--denoise-scale",
    type=click.FloatRange(0),
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
@option("--backend", default="auto", metavar="NAME", section="Machine", help="See `tarflow-fast info`.")
@device_option
@option(
    "--dtype",
    type=click.Choice(DTYPES),
    section="Machine",
    show_default="float32",
    help="Of weights and KV cache.",
)
@option(
    "--solver",
    default="auto",
    metavar="NAME",
    section="Machine",
    help="auto (the quickest for each block), sequential (exact) or adaptive.",
)
@option(
    "--tol",
    type=click.FloatRange(0),
    default=None,
    metavar="X",
    section="Machine",
    help="Of parallel passes: how far a token may still move, on the scale -1 to 1.",
)
@option("--compile", is_flag=True, section="Machine", help="Run the torch backend under torch.compile.")
@threads_option
@option(
    "--batch-size",
    type=click.IntRange(1),
    metavar="N",
    section="Machine",
    show_default="what fits in memory",
    help="Images drawn together.",
)
@option(
    "-o",
    "--out",
    type=click.Path(),
    default="samples.png",
    metavar="FILE",
    section="Output",
    help="The grid, .png or .jpg. A file of that name is replaced, here and below.",
)
@option(
    "--columns",
    type=click.IntRange(1),
    metavar="N",
    section="Output",
    show_default="a row for each class",
    help="Images in a row of the grid.",
)
@option(
    "--scale",
    type=click.IntRange(1),
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
    help="Also write every image, at its own size, to DIR/<number>.png.",
)
@option(
    "--npz",
    type=click.Path(),
    metavar="FILE",
    section="Output",
    help="Also write numbers: images (n,ch,H,W) float32, about -1 to 1; seed; first; labels; and log_prob "
    "(nats, before denoising) if unguided.",
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
    patch_size: int | None,
    in_channels: int | None,
    head_dim: int | None,
    count: int | None,
    labels: str | None,
    columns: int | None,
    scale: int | None,
    progress: bool | None,
    quiet: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Draw images from a model and write them as a grid.

    Without arguments: the shipped Fashion-MNIST model, a row of images for each class, in samples.png.
    """
    bars = show_progress(progress, quiet)
    outputs = Outputs.checked(given["out"], given["singles"], given["npz"], given["gif"])
    device = pick_device(given["device"])
    model = load_model(model_path, weights=weights, patch_size=patch_size, in_channels=in_channels, head_dim=head_dim)
    seed, first = given["seed"], given["first"]
    plan = layout(model, count, labels, columns, first)
    rule = drawing_rule(model, shipped=model_path is None, given=given)

    from ..sampler import Sampler

    sampler = Sampler(
        model,
        backend=given["backend"],
        device=device,
        dtype=torch_dtype(given["dtype"]),
        solver=given["solver"],
        tol=given["tol"],
        compile=given["compile"],
        threads=given["threads"],
    )
    samples = sampler.sample(
        plan.n,
        plan.labels,
        seed=seed,
        first=first,
        trajectory=outputs.gif is not None,
        batch_size=given["batch_size"],
        on_nonfinite=given["on_nonfinite"],
        progress=bars,
        **rule,
    )
    outputs.write(
        samples,
        columns=plan.columns,
        scale=scale or max(1, PIXELS // model.config.img_size),
        seed=seed,
        first=first,
        denoised=rule["denoise"],
    )
    if given["denoise"] is None and not rule["denoise"] and not {"noise_type", "noise_std"} & model.metadata.keys():
        said = "does not record the noise of its training: images are as drawn, not denoised; --noise-std SIGMA does it"
        warnings.warn(f"{model_path}: {said}", TarFlowWarning, stacklevel=1)
    facts = {**summary(samples, outputs), "seed": seed, "first": first, **rule}
    if as_json:
        print_json(facts)
    elif not quiet:
        click.echo("\n".join(summary_lines(facts, model, plan)))
