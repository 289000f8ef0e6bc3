"""The rule of a run says how images are guided and denoised: by what is asked for, else by what the model records."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import click

from ..errors import TarFlowWarning
from ..limits import MOST_ATTN_TEMP, MOST_GUIDANCE, MOST_SCALE
from .options import NOISE_STD, combine, option

if TYPE_CHECKING:
    from ..models.tarflow import TarFlow

GUIDANCE = click.FloatRange(0, MOST_GUIDANCE)
GUIDE_WHAT = click.Choice(["a", "b", "ab"])
ATTN_TEMP = click.FloatRange(0, MOST_ATTN_TEMP, min_open=True)
SCALE = click.FloatRange(0, MOST_SCALE)

guidance_options = combine(
    option(
        "--guide-what",
        type=GUIDE_WHAT,
        section="How to draw",
        show_default="as the model records, else ab",
        help="Guide log-scales (a), shifts (b) or both.",
    ),
    option(
        "--attn-temp",
        type=ATTN_TEMP,
        metavar="T",
        section="How to draw",
        show_default="as the model records, else 1",
        help="Temperature of attention in the branch that guidance leads away from.",
    ),
    option(
        "--annealed-guidance/--constant-guidance",
        default=None,
        section="How to draw",
        show_default="as the model records, else constant",
        help="Let guidance grow from token to token.",
    ),
)
noise_std_option = option(
    "--noise-std",
    type=NOISE_STD,
    metavar="SIGMA",
    section="How to draw",
    show_default="as recorded",
    help="Level of the noise that denoising takes off.",
)

GUIDANCE_DETAILS = ("guide_what", "attn_temp", "annealed_guidance")
DENOISING_DETAILS = ("noise_std", "denoise_scale")


def records_noise(model: TarFlow) -> bool:
    """Returns whether the model records the Gaussian noise that it was trained with, which denoising takes off."""
    return "noise_std" in model.metadata and model.metadata.get("noise_type") != "uniform"


def drawing_rule(model: TarFlow, given: dict[str, Any], labelled: bool) -> dict[str, Any]:
    """Returns guidance and denoising as arguments of `Sampler.sample`.

    What is not given is as the model records in metadata["sampling"]; without that, images are unguided, and denoised
    where the model records the Gaussian noise that it was trained with. given: the options, each None where it was not
    given. labelled: whether any image may have a class. Raises click.UsageError for an option without effect.
    """
    told = {name: value for name, value in given.items() if value is not None}
    known = {**model.metadata.get("sampling", {}), **told}
    steerable = labelled or told.get("attn_temp", 1) != 1
    if told.get("guidance") and not steerable:
        raise click.UsageError("--guidance has no effect without classes, unless --attn-temp differs from 1")
    rule: dict[str, Any] = {
        "guidance": known.get("guidance", 0.0) if steerable else 0.0,
        "denoise": known.get("denoise", records_noise(model) or "noise_std" in told),
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


def warn_undenoised(path: str | None, model: TarFlow, given: dict[str, Any], rule: dict[str, Any]) -> None:
    """Warns of images that keep the noise of training because the model at `path` does not record it."""
    if given["denoise"] is None and not rule["denoise"] and not {"noise_type", "noise_std"} & model.metadata.keys():
        said = "does not record the noise of its training: images are as drawn, not denoised; --noise-std SIGMA does it"
        warnings.warn(f"{path}: {said}", TarFlowWarning, stacklevel=2)
