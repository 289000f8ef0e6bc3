"""`tarflow-fast convert` turns one kind of checkpoint into the other."""

from __future__ import annotations

import os
from typing import Any

import click

from .info import describe_model, model_lines
from .labels import read_lines, split_list
from .options import (
    NOISE_STD,
    Command,
    json_option,
    load_model,
    option,
    print_json,
    quiet_option,
    size_options,
    torch_dtype,
)
from .outputs import output_path
from .rule import ATTN_TEMP, GUIDANCE, GUIDE_WHAT, SCALE
from .terminal import echo

DEFAULTS = "To be recorded, for `tarflow-fast sample` (.safetensors)"


def read_names(text: str) -> list[str]:
    """Returns names from "a,b,c", or, if given as @FILE, from a file that has one a line."""
    if text.startswith("@"):
        return read_lines(text[1:], "--class-names")
    return [part for part in split_list(text) if part]


@click.command(
    "convert",
    cls=Command,
    aliases={"path": "SOURCE", "model": "SOURCE"},
    short_help="Turn one kind of checkpoint into the other.",
    epilog="""\b
Examples:
  tarflow-fast convert afhq_model_8_768_8_8_0.07.pth afhq.safetensors --class-names cat,dog,wild
  tarflow-fast convert model.pth model.safetensors --patch-size 4 --noise-std 0.05 --dtype float16
  tarflow-fast convert model.safetensors model.safetensors --default-guidance 2 --default-denoise
      `tarflow-fast sample` then draws from it so, unless told otherwise.
  tarflow-fast convert model.safetensors model.pth
""",
)
@click.argument("source")
@click.argument("target", type=click.Path())
@size_options
@option(
    "--noise-std",
    type=NOISE_STD,
    metavar="SIGMA",
    section="To be recorded (.safetensors)",
    help="Level of the Gaussian noise that the model was trained with.",
)
@option(
    "--class-names",
    metavar="LIST",
    section="To be recorded (.safetensors)",
    help='One name for each class, in order: "cat,dog,wild", or @FILE with one a line.',
)
@option(
    "--default-guidance",
    type=GUIDANCE,
    metavar="W",
    section=DEFAULTS,
    help="Weight of classifier-free guidance; 0 is none.",
)
@option("--default-guide-what", type=GUIDE_WHAT, section=DEFAULTS, help="Guide log-scales (a), shifts (b) or both.")
@option(
    "--default-attn-temp",
    type=ATTN_TEMP,
    metavar="T",
    section=DEFAULTS,
    help="Temperature of attention in the branch that guidance leads away from.",
)
@option(
    "--default-annealed-guidance/--default-constant-guidance",
    default=None,
    section=DEFAULTS,
    help="Let guidance grow from token to token.",
)
@option(
    "--default-denoise/--no-default-denoise",
    default=None,
    section=DEFAULTS,
    help="Take off the Gaussian noise that the model was trained with.",
)
@option(
    "--default-denoise-scale",
    type=SCALE,
    metavar="S",
    section=DEFAULTS,
    help="Multiplier of the optimal denoising step.",
)
@option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    section="Output",
    help="Dtype of the stored weights. Half precision halves the file and rounds the weights.",
)
@quiet_option
@json_option
def convert_command(
    source: str,
    target: str,
    noise_std: float | None,
    class_names: str | None,
    dtype: str,
    quiet: bool,
    as_json: bool,
    **more: Any,
) -> None:
    """Write the model in SOURCE to TARGET, and tell what was read off its weights.

    SOURCE is a file with a TarFlow's state dict (.safetensors, .pth, .pt, .ckpt, a trainer's checkpoint), a folder of
    a model, hf://owner/name or a URL. TARGET is .safetensors (weights, sizes, metadata) or .pth (ml-tarflow's state
    dict: weights alone). What SOURCE records goes with it, unless other values are given here. A file named TARGET is
    replaced.
    """
    params = {str(param.name): param for param in convert_command.params}
    defaults = {name: more.pop(name) for name in params if name.startswith("default_")}
    path = output_path("TARGET", target, (".safetensors", ".pth"))
    recorded = {"noise_std": noise_std, "class_names": class_names, **defaults}
    flags = [params[name].opts[0] for name, value in recorded.items() if value is not None]
    if path.suffix == ".pth" and flags:
        raise click.UsageError(f"a .pth file holds weights alone; {', '.join(flags)} need .safetensors")
    if not os.path.exists(source) and ":/" not in source:
        raise click.UsageError(f"SOURCE: no such file, {source!r}")
    names = None if class_names is None else read_names(class_names)
    model = load_model(source, **more)
    if noise_std is not None:
        model.metadata.update(noise_type="gaussian", noise_std=noise_std)
    if names is not None:
        if len(names) != model.config.num_classes:
            raise click.UsageError(f"--class-names: expected {model.config.num_classes} names, got {len(names)}")
        model.metadata["class_names"] = names
    sampling = {name.removeprefix("default_"): value for name, value in defaults.items() if value is not None}
    if sampling:
        if sampling.get("denoise") and not model.metadata.get("noise_std"):
            raise click.UsageError("--default-denoise needs --noise-std, as the model records no noise")
        model.metadata["sampling"] = {**model.metadata.get("sampling", {}), **sampling}

    from ..checkpoints import save

    save(model, path, dtype=torch_dtype(dtype))
    facts = {"source": source, "target": target, "bytes": path.stat().st_size, "stored_dtype": dtype}
    facts["model"] = described = describe_model(model)
    if as_json:
        print_json(facts)
    elif not quiet:
        lines = [f"{target}: {path.stat().st_size / 1e6:.1f} MB, {dtype}", *model_lines(described)]
        if path.suffix == ".pth" and model.metadata:
            lines.append(f"left out, as .pth holds weights alone: {', '.join(model.metadata)}")
        echo(*lines)
