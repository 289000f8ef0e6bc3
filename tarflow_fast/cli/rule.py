"""The rule of a run says how images are guided and denoised: by what is asked for, else by what the model records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..limits import MOST_ATTN_TEMP, MOST_GUIDANCE, MOST_SCALE

if TYPE_CHECKING:
    from ..models.tarflow import TarFlow

GUIDANCE = click.FloatRange(0, MOST_GUIDANCE)
GUIDE_WHAT = click.Choice(["a", "b", "ab"])
ATTN_TEMP = click.FloatRange(0, MOST_ATTN_TEMP, min_open=True)
SCALE = click.FloatRange(0, MOST_SCALE)

GUIDANCE_DETAILS = ("guide_what", "attn_temp", "annealed_guidance")
DENOISING_DETAILS = ("noise_std", "denoise_scale")


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
