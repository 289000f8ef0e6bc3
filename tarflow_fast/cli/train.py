"""`tarflow-fast train` learns a model from images."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from .convert import read_names
from .options import (
    Command,
    F,
    TwoSides,
    cache_option,
    combine,
    layout_option,
    option,
    progress_option,
    quiet_option,
    threads_option,
    values_option,
)
from .terminal import echo

TOP_PAD = 1 << 28  # the heap grows by so many bytes


def numbers(section: str, *rows: tuple[str, int | float, str, str]) -> Callable[[F], F]:
    """Returns options of rows (flag and perhaps parameter, default, metavar, help), typed as their defaults."""
    return combine(
        *(
            option(*names.split(), type=type(value), default=value, metavar=metavar, section=section, help=text)
            for names, value, metavar, text in rows
        )
    )


data_options = combine(
    option(
        "--data",
        type=click.Path(),
        metavar="PATH",
        section="Data",
        help="Images to learn: a folder with a sub-folder of pictures for each class, a .npz file (images or "
        "sequences, labels), a .npy file, an IDX file, or a folder of MNIST's four IDX files; or a folder with train "
        "and val or test halves. With --flow also the name of a demonstration (`tarflow-fast flows` lists them), or an "
        "array of vectors (N,D) or of tokens (N,T), which are integers. Required unless --resume is given.",
    ),
    option(
        "--eval-data",
        type=click.Path(),
        metavar="PATH",
        section="Data",
        help="Held-out images for bits/dim. Where a folder has a train and a test (or val) half, the test half "
        "is taken, so that it may be the folder given as --data. Classes are matched by name.",
    ),
    option(
        "--img-size",
        type=TwoSides(click.INT),
        metavar="N|HxW",
        section="Data",
        help="Pixels along the sides; needed for folders of pictures, which are resized and cropped to it.",
    ),
    option(
        "--in-channels",
        type=click.Choice(["1", "3"]),
        default="3",
        section="Data",
        help="Channels that pictures of a folder get: 1 makes them grey.",
    ),
    option(
        "--conditional/--unconditional",
        default=True,
        section="Data",
        help="Learn p(x | label), or p(x).",
    ),
    option(
        "--class-names",
        metavar="LIST",
        section="Data",
        help='One name for each class, in the order of the data\'s: "cat,dog,wild", or @FILE with one a line.',
    ),
    layout_option,
    values_option,
    cache_option,
    option("--flip", is_flag=True, section="Data", help="Mirror half of the images."),
    option(
        "--noise-type",
        type=click.Choice(["gaussian", "uniform"]),
        default="gaussian",
        section="Data",
        help="Noise on the images: gaussian for pictures, uniform (dequantisation) for bits/dim.",
    ),
    numbers(
        "Data",
        ("--noise-std", 0.05, "SIGMA", "Level of Gaussian noise, images being in -1 to 1."),
        ("--drop-label", 0.1, "SHARE", "Share of labels replaced by 'no class', which guidance needs."),
    ),
)

size_options = combine(
    option(
        "--init",
        type=click.Path(dir_okay=False),
        metavar="FILE",
        section="Model",
        help="Start from this checkpoint, ml-tarflow's .pth or one of ours, which sets the sizes below.",
    ),
    option(
        "--patch-size",
        type=TwoSides(click.INT),
        default=4,
        metavar="N|HxW",
        section="Model",
        help="Pixels along a patch's sides.",
    ),
    numbers(
        "Model",
        ("--channels", 512, "N", "Width of the transformers."),
        ("--blocks num_blocks", 8, "N", "Number of flow blocks."),
        ("--layers layers_per_block", 8, "N", "Number of transformer layers of each flow block."),
        ("--head-dim", 64, "N", "Channels of an attention head."),
    ),
    option(
        "--nvp/--vp",
        default=True,
        section="Model",
        help="Use affine blocks, or volume-preserving ones (shift only).",
    ),
)

family_options = combine(
    option(
        "--flow",
        metavar="NAME",
        section="Another family",
        show_default="a TarFlow",
        help="Family of flow that is trained in place of a TarFlow; `tarflow-fast flows` lists them. Sizes above, but "
        "for data, are for TarFlow alone, and schedule and precision have other defaults.",
    ),
    option(
        "--option",
        "family_options",
        multiple=True,
        metavar="NAME=VALUE",
        section="Another family",
        help="An option of the family, such as couplings=12 or hidden=64,64; may be given several times.",
    ),
    option(
        "--dequantization",
        type=click.Choice(["uniform", "variational"]),
        default="uniform",
        section="Another family",
        help="Noise that makes 8-bit images continuous; variational noise is learnt.",
    ),
    option(
        "--logit/--no-logit",
        default=True,
        section="Another family",
        help="Bring 8-bit images from their box to all of space.",
    ),
    numbers("Another family", ("--alpha", 0.05, "A", "How far the logit keeps away from black and white.")),
    option(
        "--manifold",
        type=click.Choice(["sphere", "torus"]),
        section="Another family",
        help="Take vectors of a file as points of the unit sphere, or as angles.",
    ),
)

schedule_options = combine(
    numbers("Schedule", ("--epochs", 100, "N", "Number of passes over the data.")),
    option(
        "--batch-size",
        type=int,
        metavar="N",
        section="Schedule",
        show_default="256, or all images where there are fewer",
        help="Number of images in a step, over all processes.",
    ),
    option(
        "--schedule",
        type=click.Choice(["cosine", "polynomial"]),
        default="cosine",
        section="Schedule",
        help="How the learning rate falls after the warm-up.",
    ),
    numbers(
        "Schedule",
        ("--lr", 1e-4, "RATE", "Highest learning rate."),
        ("--min-lr", 1e-6, "RATE", "Learning rate at the end."),
        ("--decay-power", 1.0, "P", "Power of the polynomial."),
        ("--warmup-steps", 1000, "N", "Number of steps in which the highest learning rate is reached."),
        ("--weight-decay", 1e-4, "X", "Weight decay of AdamW."),
        ("--clip-norm", 1.0, "X", "Limit of the gradient's norm; 0 is none."),
        ("--ema-decay", 0.999, "X", "Decay of the moving average of the weights, which is the model that is saved."),
        ("--seed", 0, "N", "Seed of weights, order, noise and dropped labels."),
    ),
)

machine_options = combine(
    option("--device", default="auto", metavar="NAME", section="Machine", help="Device to use: cpu, cuda or auto."),
    option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16"]),
        default="bfloat16",
        section="Machine",
        help="bfloat16 is mixed precision: fp32 weights, residual stream and log-det.",
    ),
    threads_option,
    option("--compile", is_flag=True, section="Machine", help="Train the model under torch.compile."),
)

output_options = combine(
    option(
        "--out",
        required=True,
        type=click.Path(),
        metavar="FOLDER",
        section="Output",
        help="Folder for checkpoint.pt, model.safetensors, train.csv, eval.csv and samples/.",
    ),
    option(
        "--resume",
        is_flag=True,
        outside=True,
        section="Output",
        help="Go on from the checkpoint in --out, with the options that it records: others need not be given, and "
        "may change where the result does not depend on them (--epochs, --device, what is written when, paths).",
    ),
    numbers(
        "Output",
        ("--log-every", 50, "N", "Steps between rows of train.csv."),
        ("--checkpoint-every", 500, "N", "Steps between checkpoints."),
        ("--eval-every", 0, "N", "Steps between rows of eval.csv; 0 writes one at the end only."),
        ("--eval-images", 1000, "N", "Number of held-out images."),
        ("--sample-every", 0, "N", "Steps between grids of samples; 0 is none."),
        ("--sample-rows", 4, "N", "Number of rows of a grid, in which each class has a column."),
        ("--sample-guidance", 0.0, "W", "Weight of the guidance of the samples."),
    ),
    option(
        "--tensorboard", is_flag=True, outside=True, section="Output", help="Write the metrics for TensorBoard too."
    ),
    progress_option,
    quiet_option,
)


def keep_freed_memory() -> None:
    """Tells glibc not to give freed memory back: a step would map and clear all its activations anew."""
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # other C libraries have no such function
        m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # these numbers are from malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_top_pad, TOP_PAD)


@click.command(
    "train",
    cls=Command,
    aliases={"options": "--option", "path": "--init", "weights": "convert --weights"},
    short_help="Train a model on images.",
    epilog="""\b
Examples:
  tarflow-fast train --data images/ --img-size 64 --flip --out run
      Learns images/cat/1.jpg, images/dog/1.jpg, …, with sizes and schedule for a GPU.
  tarflow-fast train --data fashion-mnist/ --eval-data fashion-mnist/ --channels 128 --blocks 4 --layers 4 \\
      --noise-std 0.1 --batch-size 128 --epochs 12 --lr 1e-3 --warmup-steps 400 --out run
      Learns MNIST's four IDX files, in hours of two CPU cores.
  tarflow-fast train --resume --out run
      Goes on where a killed run made its last checkpoint.
  tarflow-fast train --init afhq_model_8_768_8_8_0.07.pth --data cats/ --img-size 256 --out run
      Starts from a model that is there.
  torchrun --nproc-per-node 8 -m tarflow_fast train …
      The same run, shared by 8 GPUs.
  tarflow-fast train --data faces/ --img-size 48x32 --patch-size 4x2 --out run
      Images that are 48 pixels high and 32 wide.
  tarflow-fast train --data series.npy --layout tokens --unconditional --out run
      Sequences (N,T,D) of floats, as they are.
  tarflow-fast train --flow realnvp --data moons --out run
      Another family of flows on a demonstration, half of which is held out.
  tarflow-fast train --flow realnvp --option couplings=4 --data digits --conditional --sample-every 500 --out run
  tarflow-fast sample -m run/model.safetensors
""",
)
@data_options
@size_options
@family_options
@schedule_options
@machine_options
@output_options
@click.pass_context
def train_command(
    ctx: click.Context,
    init: str | None,
    in_channels: str,
    class_names: str | None,
    clip_norm: float,
    flow: str | None,
    resume: bool,
    progress: bool | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Train a TarFlow on images. The folder --out gets the model (the moving average of the weights), a
    checkpoint from which --resume goes on exactly, and the metrics. Ctrl-C and SIGTERM write a checkpoint
    before they end the run. Where standard error is no terminal, a line for each row of metrics tells of progress."""
    shown = _progress(progress, quiet)
    if init is not None and resume:
        raise click.UsageError("--init and --resume exclude each other")
    options |= {"in_channels": int(in_channels), "clip_norm": clip_norm or None}
    options["class_names"] = None if class_names is None else tuple(read_names(class_names))
    given = {
        name: value for name, value in options.items() if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT
    }

    from ..errors import ArgumentError, TrainingStopped
    from ..trainer import CHECKPOINT, TrainConfig, continued, read_init, sizes_of, train
    from .families import flow_config, with_family_defaults

    family = flow_config(flow, options, given)
    if family is not None:
        options = with_family_defaults(family.name, options, given) | {"flow": family}
        given["flow"] = family

    how: dict[str, Any] = {"resume": resume, "progress": shown}
    try:
        if resume and (Path(options["out"]) / CHECKPOINT).is_file():
            config = continued(Path(options["out"]), given)
        elif options["data"] is None and resume:
            raise ArgumentError("resume", f"a checkpoint {Path(options['out']) / CHECKPOINT}", "none")
        elif options["data"] is None:
            raise click.MissingParameter(ctx=ctx, param=next(p for p in ctx.command.params if p.name == "data"))
        else:
            if init is not None and family is not None:
                how["init"] = init
            elif init is not None:
                how["init"] = read_init(init, given)
                options |= sizes_of(how["init"].model, given)
            config = TrainConfig(**options)
        keep_freed_memory()
        train(config, **how)
    except TrainingStopped as stopped:
        echo(stopped, err=True)
        ctx.exit(128 + stopped.signal)
    if not quiet and os.environ.get("RANK", "0") == "0":
        echo(os.path.join(config.out, "model.safetensors"))


def _progress(progress: bool | None, quiet: bool) -> bool | str:
    """Returns what `train` takes as `progress`. Raises click.UsageError where both options are given."""
    if quiet and progress:
        raise click.UsageError("--progress and --quiet exclude each other")
    if progress is None:
        return not quiet
    return "bar" if progress else False
