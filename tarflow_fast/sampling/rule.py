"""The rule of a run says how its images are drawn: guided, denoised, and what becomes of those that are not finite."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..checks import GUIDE_WHAT, check_choice, check_number
from ..engine import Guidance
from ..errors import ArgumentError
from ..flow import Flow
from ..limits import MOST_ATTN_TEMP, MOST_GUIDANCE, MOST_NOISE_STD, MOST_SCALE
from ..scalars import check_flag, plain
from .noise import resolve_noise_std

# A model may have its own defaults of these arguments of `Sampler.sample`, metadata["sampling"]; each has its check.
CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "guidance": functools.partial(check_number, low=0, high=MOST_GUIDANCE),
    "guide_what": functools.partial(check_choice, choices=GUIDE_WHAT),
    "attn_temp": functools.partial(check_number, low=0, high=MOST_ATTN_TEMP, open_low=True),
    "annealed_guidance": check_flag,
    "denoise": check_flag,
    "denoise_scale": functools.partial(check_number, low=0, high=MOST_SCALE),
}


@dataclass(frozen=True)
class Rule:
    """A `Rule` holds the arguments of `Sampler.sample` that images are drawn by.

    guidance: the guidance. denoise: whether Tweedie's step follows. noise_std: σ of the noise that it takes off, 0
    without it. denoise_scale: the multiplier of that step. trajectory: whether the images after each block are kept.
    redraw: whether images that are not finite are drawn again.
    """

    guidance: Guidance
    denoise: bool
    noise_std: float
    denoise_scale: float
    trajectory: bool
    redraw: bool

    @classmethod
    def checked(
        cls,
        flow: Flow,
        unlabelled: bool,
        *,
        guidance: Any,
        guide_what: Any,
        attn_temp: Any,
        annealed_guidance: Any,
        denoise: Any,
        noise_std: Any,
        denoise_scale: Any,
        trajectory: Any,
        on_nonfinite: Any,
    ) -> Rule:
        """Returns the rule of these arguments of `Sampler.sample`.

        flow: the model. unlabelled: whether no image has a class. Raises ArgumentError for an argument of another type
        or range, and for one that would have no effect.
        """
        classifier_free = Guidance(plain(guidance), guide_what, plain(attn_temp), plain(annealed_guidance))
        for name, value in {"guidance": guidance, "attn_temp": attn_temp}.items():
            CHECKS[name](name, value)
        check_choice("on_nonfinite", on_nonfinite, ("raise", "redraw"))
        scale = CHECKS["denoise_scale"]("denoise_scale", denoise_scale)
        trajectory, denoise, sigma = check_flag("trajectory", trajectory), check_flag("denoise", denoise), 0.0
        if denoise:
            if flow.denoise is None:
                raise ArgumentError("denoise", "False, as the model has no denoising step", True)
            sigma = resolve_noise_std(flow.metadata, noise_std)
            check_number("noise_std", sigma, 0, MOST_NOISE_STD, open_low=True)
        elif noise_std is not None or scale != 1:
            name, value = ("denoise_scale", scale) if noise_std is None else ("noise_std", noise_std)
            raise ArgumentError(name, "the default where denoise is off, as it has no effect", repr(value))
        check_effect(classifier_free, unlabelled)
        return cls(classifier_free, denoise, sigma, scale, trajectory, on_nonfinite == "redraw")


def check_effect(guidance: Guidance, unlabelled: bool) -> None:
    """Raises ArgumentError for arguments of guidance that would have no effect.

    unlabelled: whether no image has a class.
    """
    details = {
        "guide_what": (guidance.what, "ab"),
        "attn_temp": (guidance.attn_temp, 1),
        "annealed_guidance": (guidance.annealed, False),
    }
    if not guidance.active:
        for name, (value, default) in details.items():
            if value != default:
                raise ArgumentError(name, "the default where guidance is 0, as it has no effect", repr(value))
    elif unlabelled and guidance.attn_temp == 1:
        expected = "0 without labels, where it has no effect unless attn_temp differs from 1"
        raise ArgumentError("guidance", expected, repr(guidance.scale))
