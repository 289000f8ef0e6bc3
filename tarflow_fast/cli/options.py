"""The commands share help in sections, options for the model and the machine, and output.

Nothing here imports torch before a command runs, so that --help is quick.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import TarFlowError
from ..limits import MOST_BATCH, MOST_NOISE_STD, MOST_SEED, MOST_SIZE, most_threads
from ..sizes import Size
from .messages import SIZES, failure
from .terminal import echo

if TYPE_CHECKING:
    import torch

    from ..evaluation import Inception
    from ..models.tarflow import TarFlow

F = TypeVar("F", bound=Callable[..., Any])

DTYPES = ("float32", "bfloat16", "float16", "float64")
SIZE = click.IntRange(1, MOST_SIZE)


class TwoSides(click.ParamType):
    """A `TwoSides` reads one whole number for a square, or HEIGHTxWIDTH. side: the type of each number."""

    name = SIZES

    def __init__(self, side: click.ParamType):
        self.side = side

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Size:
        if isinstance(value, (int, tuple)):
            return value
        first, cross, second = str(value).lower().replace("×", "x").partition("x")
        if not all(side.strip().lstrip("+-").isdecimal() for side in (first, second if cross else first)):
            self.fail(f"{value!r} is neither a whole number, of a square, nor two, as in 48x64.", param, ctx)
        height: int = self.side.convert(first, param, ctx)
        width: int = self.side.convert(second, param, ctx) if cross else height
        return height if height == width else (height, width)


SIZE_OR_SIZES = TwoSides(SIZE)
BATCH = click.IntRange(1, MOST_BATCH)
NOISE_STD = click.FloatRange(0, MOST_NOISE_STD, min_open=True)
SEED = click.IntRange(0, MOST_SEED)


class Option(click.Option):
    """An `Option` belongs to a section of the help.

    section: the title of that section. outside: whether what can be wrong with its value lies outside the command line,
    as in a file of that name: the command then fails, where a wrong value of another option is wrong usage.
    """

    def __init__(self, *args: Any, section: str = "Other", outside: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.section, self.outside = section, outside or isinstance(self.type, click.Path)


class Command(click.Command):
    """A `Command` lists its options by section; its arguments are told by its text.

    What the library raises becomes one line that speaks of flags. aliases: the names, in messages, of those of the
    library's arguments that no parameter of this command is named after.
    """

    def __init__(self, *args: Any, aliases: Mapping[str, str] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.aliases = dict(aliases or {})

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (TarFlowError, OSError, MemoryError) as error:
            if ctx.find_root().params.get("traceback") or isinstance(error, BrokenPipeError):
                raise
            raise failure(ctx, self, error) from error

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and isinstance(param, Option):
                sections.setdefault(param.section, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def option(*names: str, section: str, **attributes: Any) -> Callable[[F], F]:
    return click.option(*names, cls=Option, section=section, **attributes)


def combine(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Returns one decorator that adds all these options, listed in this order."""

    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


size_options = combine(
    option(
        "--weights",
        metavar="NAME",
        section="Model",
        show_default="the average where there is one",
        help="The set of weights that is taken where a file holds several: ema, model, or its name.",
    ),
    option(
        "--patch-size",
        type=SIZE_OR_SIZES,
        metavar="N|HxW",
        section="Model",
        help="Pixels along a patch's sides, for a .pth file whose weights leave it open.",
    ),
    option(
        "--img-size",
        type=SIZE_OR_SIZES,
        metavar="N|HxW",
        section="Model",
        help="Pixels along an image's sides, for a .pth file of images that are not square.",
    ),
    option(
        "--in-channels",
        type=SIZE,
        metavar="N",
        section="Model",
        help="Image channels, for a .pth file whose weights leave it open.",
    ),
    option(
        "--head-dim",
        type=SIZE,
        metavar="N",
        section="Model",
        help="Channels of one attention head, for a .pth file where they are not 64.",
    ),
)

model_options = combine(
    option(
        "-m",
        "--model",
        "model_path",
        metavar="FILE",
        section="Model",
        outside=True,
        show_default="the shipped Fashion-MNIST model",
        help="A checkpoint: .safetensors, ml-tarflow's .pth, others' .pt and .ckpt, a folder, hf://owner/name, a URL.",
    ),
    size_options,
)

device_option = option(
    "--device",
    metavar="NAME",
    section="Machine",
    show_default="the best there is",
    help="Device to run on: cpu, cuda, cuda:1, mps.",
)
threads_option = option(
    "--threads",
    type=click.IntRange(1, most_threads()),
    metavar="N",
    section="Machine",
    show_default="as many as PyTorch takes",
    help="Number of threads on a CPU.",
)
progress_option = option(
    "--progress/--no-progress",
    default=None,
    section="Output",
    show_default="on a terminal",
    help="Show progress bars on standard error.",
)
quiet_option = option("-q", "--quiet", is_flag=True, section="Output", help="Print nothing but errors.")
layout_option = option(
    "--layout",
    type=click.Choice(["auto", "NHWC", "NCHW", "tokens"]),
    default="auto",
    section="Data",
    help="Where an array has its channels, which must be given where its shape does not tell. tokens stands for "
    "sequences (N,T,D) of floats, which the model takes as they are.",
)
values_option = option(
    "--values",
    type=click.Choice(["auto", "0..1", "-1..1", "0..255", "raw"]),
    default="auto",
    section="Data",
    help="What an array's floats mean; raw stands for data that are no pictures, which the model takes as they are.",
)
cache_option = option(
    "--cache",
    type=click.Path(),
    metavar="FOLDER",
    section="Data",
    show_default="the system's temporary folder",
    help="Folder for images that memory has no room for, or that several processes share.",
)


def inception_option(section: str, purpose: str = "") -> Callable[[F], F]:
    return option(
        "--inception",
        type=click.Path(),
        metavar="FILE|download",
        section=section,
        show_default="that of torch-fidelity's cache",
        help=f"torch-fidelity's file of the weights of Inception-v3{purpose}; download stands for fetching it into its "
        "cache, 91 MB, where it is not there.",
    )


features_option = option(
    "--features",
    type=click.Path(),
    metavar="FOLDER",
    section="Many images",
    help="Keep the features in this folder as they are computed: however the command is stopped, the same one goes on, "
    "and any number of processes may run it, by torchrun or on machines that share FOLDER.",
)
json_option = option("--json", "as_json", is_flag=True, section="Output", help="Print the report as JSON.")


def load_model(
    path: str | None,
    *,
    weights: str | None = None,
    **sizes: Any,
) -> TarFlow:
    """Returns the checkpoint at `path`, or the shipped model.

    sizes: the sizes that `load` takes, each None where it was not given. Raises click.UsageError where they are given
    for the shipped model.
    """
    from ..checkpoints import load, load_pretrained

    if path is not None:
        return load(path, weights=weights, **sizes)
    for name, value in {"weights": weights, **sizes}.items():
        if value is not None:
            raise click.UsageError(f"--{name.replace('_', '-')} goes with --model")
    return load_pretrained()


def load_inception(inception: str | None, device: torch.device) -> Inception:
    """Returns the network that --inception names; its weights are read when features are wanted."""
    from .. import evaluation

    if inception == "download":
        return evaluation.Inception(device=device, download=True)
    return evaluation.Inception(inception, device=device)


def torch_dtype(name: str | None) -> torch.dtype | None:
    import torch

    dtype: torch.dtype | None = None if name is None else getattr(torch, name)
    return dtype


def show_progress(progress: bool | None, quiet: bool) -> bool:
    if quiet and progress:
        raise click.UsageError("--progress and --quiet exclude each other")
    return sys.stderr.isatty() and not quiet if progress is None else progress


def print_json(report: dict[str, Any]) -> None:
    """Prints the report on standard output as strict JSON: a number that is not finite becomes null."""

    def strict(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): strict(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [strict(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    text = json.dumps(strict(report), indent=2, allow_nan=False)  # it is in ASCII, so that no name steers the terminal
    echo(*text.replace("\x7f", "\\u007f").splitlines())
