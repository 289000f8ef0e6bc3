"""`tarflow-fast eval` measures how good a model is on data."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import click

from ..errors import TarFlowWarning
from .convert import read_names
from .families import PathOrDemonstration, holds_family, score_family, score_lines
from .options import (
    BATCH,
    NOISE_STD,
    SEED,
    Command,
    cache_option,
    device_option,
    json_option,
    layout_option,
    load_model,
    model_options,
    option,
    print_json,
    progress_option,
    quiet_option,
    show_progress,
    threads_option,
    torch_dtype,
    values_option,
)
from .terminal import echo

if TYPE_CHECKING:
    from ..data import ImageData
    from ..evaluation import BayesAccuracy, BitsPerDim
    from ..models.tarflow import TarFlow


def load_data(model: TarFlow, path: str, limit: int | None, names: list[str] | None, **how: Any) -> ImageData:
    """Returns the images with the model's labels, or `limit` of them evenly spread, as data may be sorted by class.

    names: the names that the data's classes get in place of their own, or None. how: the arguments of `load_images`.
    Raises click.UsageError where the layout does not go with the model.
    """
    from ..data import load_images, matched, renamed

    config = model.config
    channels = config.in_channels if config.in_channels in (1, 3) else 3  # pictures have no others
    sequences, layout = config.layout == "tokens", how["layout"]
    if sequences and layout not in ("auto", "tokens"):
        raise click.UsageError(f"--layout: expected tokens, as the model's data are sequences, got {layout}")
    if layout == "tokens" and not sequences:
        raise click.UsageError("--layout: expected auto, NHWC or NCHW, as the model's data are images, got tokens")
    how |= {"layout": "tokens", "size": None} if sequences else {"size": config.img_size}
    data = load_images(path, channels=channels, **how)
    data = data if names is None else renamed(data, names, "--class-names")
    given = "--data" if names is None else "--class-names"
    data = matched(data, model.metadata.get("class_names"), config.num_classes, given)
    return data if limit is None else data.spread(limit)


def bits_lines(found: BitsPerDim, model: TarFlow) -> list[str]:
    error = "" if found.standard_error is None else f" ± {found.standard_error:.4f}"
    kind = model.config.kind
    meaning = {
        "uniform": "a bound on the bits that a code by this model takes for an 8-bit value",
        "gaussian": f"the density of noisy {kind}: compares between models of this noise level only",
        "none": f"the density of the {kind} in their own unit: compares between models of the same data only",
    }[found.noise.kind]
    if model.raw and found.noise.kind == "gaussian":
        meaning = meaning.removesuffix("only") + "and the same data only, in their own unit"
    return [f"bits/dim        {found.mean:.4f}{error}  ({found.noise}; {found.seconds:.1f} s)", f"  {meaning}"]


def accuracy_line(found: BayesAccuracy) -> str:
    return (
        f"Bayes accuracy  {100 * found.accuracy:.2f} % ± {100 * found.standard_error:.2f}  "
        f"({found.correct} of {found.images}; {found.noise}; {found.seconds:.1f} s)"
    )


@click.command(
    "eval",
    cls=Command,
    aliases={"path": "--model", "model": "--model", "images": "the images of --data"},
    short_help="Measure bits/dim and classification accuracy on data.",
    epilog="""\b
Examples:
  tarflow-fast eval --data fashion-mnist/
      The shipped model on the test images of a folder with MNIST's four IDX files.
  tarflow-fast eval -m model.safetensors --data images/ --split test --limit 1000
  tarflow-fast eval -m model.pth --data test.npz --noise gaussian --noise-std 0.07 --json
""",
)
@model_options
@option(
    "--data",
    "data_path",
    type=PathOrDemonstration(exists=True),
    required=True,
    metavar="PATH",
    section="Data",
    help="A folder with a sub-folder of pictures for each class, or with MNIST's IDX files; an IDX file; a .npz file "
    "with images (N,H,W[,ch] or N,ch,H,W) or sequences (N,T,D), and labels; or a .npy file. Classes are matched "
    "by name, and by number where the data has no names. For a model of another family also the name of a "
    "demonstration (`tarflow-fast flows` lists them).",
)
@option(
    "--split",
    type=click.Choice(["train", "val", "test"]),
    default="test",
    section="Data",
    help="The part that is taken of data that has parts; val serves as test where there is no other.",
)
@option(
    "--class-names",
    metavar="LIST",
    section="Data",
    help='Names for the data\'s classes, in their order, by which the model finds them: "cat,dog", or @FILE.',
)
@layout_option
@values_option
@cache_option
@option(
    "--limit",
    type=click.IntRange(1),
    metavar="N",
    section="Data",
    help="Take only N images, evenly spread over the data.",
)
@option(
    "--noise",
    type=click.Choice(["auto", "uniform", "gaussian"]),
    default="auto",
    section="What to compute",
    help="Noise on the images for bits/dim: uniform dequantisation, or Gaussian of the level in training; "
    "auto is what the model was trained with.",
)
@option(
    "--noise-std",
    type=NOISE_STD,
    metavar="SIGMA",
    section="What to compute",
    show_default="as the checkpoint records",
    help="Level of Gaussian noise, images being in -1 to 1.",
)
@option(
    "--accuracy/--no-accuracy",
    default=None,
    section="What to compute",
    show_default="with a conditional model and labelled data",
    help="Classify each image by Bayes' rule, argmax over y of log p(x|y); costs a pass for each class.",
)
@option(
    "--accuracy-noise",
    type=click.Choice(["none", "auto", "uniform", "gaussian"]),
    default="none",
    section="What to compute",
    help="Noise on the images that are classified.",
)
@option(
    "--draws",
    type=click.IntRange(1),
    default=1,
    metavar="N",
    section="What to compute",
    help="Average over N noise draws for each image.",
)
@option("--seed", type=SEED, default=0, metavar="N", section="What to compute", help="Seed of the noise.")
@device_option
@option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    section="Machine",
    help="Half precision (autocast) is faster on GPUs, and less exact.",
)
@option(
    "--batch-size",
    type=BATCH,
    default=128,
    metavar="N",
    section="Machine",
    help="Number of images in one pass.",
)
@threads_option
@progress_option
@quiet_option
@json_option
def eval_command(
    model_path: str | None,
    data_path: str,
    split: str,
    class_names: str | None,
    layout: str,
    values: str,
    cache: str | None,
    limit: int | None,
    noise: str,
    noise_std: float | None,
    accuracy: bool | None,
    accuracy_noise: str,
    draws: int,
    seed: int,
    device: str | None,
    dtype: str,
    batch_size: int,
    threads: int | None,
    progress: bool | None,
    quiet: bool,
    as_json: bool,
    **which: Any,
) -> None:
    """Measure bits per dimension on a data set and, for a class-conditional model, the accuracy of the
    classifier that Bayes' rule makes of it."""
    bars = show_progress(progress, quiet)
    if holds_family(model_path):
        if accuracy:
            raise click.UsageError("--accuracy is for TarFlow")
        how_read = {"split": split, "layout": layout, "values": values, "cache": cache, "progress": bars}
        score = score_family(str(model_path), data_path, limit, seed, batch_size, device, threads, **how_read)
        if as_json:
            print_json({"model": model_path, "data": data_path, "split": split, **score.to_dict()})
        elif not quiet:
            echo(*score_lines(score, str(model_path), data_path))
        return

    from ..devices import pick_device

    place = pick_device(device)
    model = load_model(model_path, **which).to(place)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)

    from ..evaluation import Noise, bayes_accuracy, bits_per_dim

    for_bits = Noise.of(model, noise, noise_std, seed)
    conditional = model.config.num_classes > 0
    if class_names is not None and not conditional:
        raise click.UsageError("--class-names goes with a class-conditional model")
    names = None if class_names is None else read_names(class_names)
    how_read = {"split": split, "layout": layout, "values": values, "cache": cache, "progress": bars}
    data = load_data(model, data_path, limit, names, **how_read)
    if accuracy is None:
        accuracy = conditional and data.labels is not None
    elif accuracy and conditional and data.labels is None:
        raise click.UsageError(f"--accuracy needs labels, and {data_path} has none")
    how: dict[str, Any] = {
        "draws": draws,
        "batch_size": batch_size,
        "autocast": None if dtype == "float32" else torch_dtype(dtype),
        "progress": bars,
    }
    facts: dict[str, Any] = {"model": model_path, "data": data_path, "split": split, "images": len(data)}
    bits = bits_per_dim(model, data, noise=for_bits, **how)
    facts["bits_per_dim"] = bits.to_dict()
    lines = [
        f"{model_path or 'the shipped model'} on {data_path}, {len(data)} {data.kind}",
        *bits_lines(bits, model),
    ]
    if accuracy:
        for_accuracy = Noise.of(model, accuracy_noise, noise_std if accuracy_noise != "none" else None, seed)
        found = bayes_accuracy(model, data, noise=for_accuracy, **how)
        facts["bayes_accuracy"] = found.to_dict()
        lines.append(accuracy_line(found))
    if noise == "auto" and noise_std is None and not model.metadata.keys() & {"noise_type", "noise_std"}:
        said = f"the checkpoint does not record the noise of its training; {bits.noise} is taken"
        warnings.warn(said, TarFlowWarning, stacklevel=1)
    if as_json:
        print_json(facts)
    elif not quiet:
        echo(*lines)
