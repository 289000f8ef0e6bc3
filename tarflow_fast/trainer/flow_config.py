"""A `FlowConfig` says which family of flow a run trains, and how its data are brought to it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from ..checks import check_choice, check_number
from ..data import DEMONSTRATIONS
from ..errors import ArgumentError
from ..flows import FAMILIES
from ..scalars import check_flag

DEQUANTIZATIONS = ("uniform", "variational")
MANIFOLDS = ("sphere", "torus")
DEFAULTS: dict[str, Any] = {
    "conditional": False,
    "epochs": 100,
    "lr": 1e-3,
    "warmup_steps": 100,
    "schedule": "polynomial",
    "weight_decay": 0.0,
    "ema_decay": 0.99,
    "dtype": "float32",
}
"""What a run of a family has in place of the defaults of `TrainConfig`, which are for TarFlow."""

ONLY_TARFLOW = (
    *("patch_size", "channels", "num_blocks", "layers_per_block", "nvp", "head_dim", "class_names"),
    *("noise_type", "noise_std", "sample_guidance"),
)
"""The options of `TrainConfig` that mean nothing for families, and stay at their defaults."""

ONLY_LEVELS = ("dequantization", "logit", "alpha")
"""The fields of `FlowConfig` that mean something for 8-bit images alone."""


@dataclass(frozen=True)
class FlowConfig:
    """A `FlowConfig` says which family a run trains.

    Attributes:
        name: The family, one of `tarflow_fast.flows.FAMILIES`.
        options: The options of the family, as pairs of name and value.
        dequantization: The noise that makes 8-bit images continuous, "uniform" or "variational" (learnt).
        logit: Whether dequantised images go through the logit.
        alpha: α, by which the logit keeps away from 0 and 1.
        manifold: "sphere" or "torus" where vectors of a file are points there, or None.

    Raises:
        ArgumentError: A field has the wrong type or range; whether the family has the options is told by `build`.
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()
    dequantization: str = "uniform"
    logit: bool = True
    alpha: float = 0.05
    manifold: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ArgumentError("flow", "the name of a family", repr(self.name))
        if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in self.options):
            raise ArgumentError("option", "pairs of name and value", repr(self.options))
        check_choice("dequantization", self.dequantization, DEQUANTIZATIONS)
        object.__setattr__(self, "logit", check_flag("logit", self.logit))
        check_number("alpha", self.alpha, 0, 0.25, open_low=True)
        if self.manifold is not None:
            check_choice("manifold", self.manifold, MANIFOLDS)

    def __str__(self) -> str:
        """The family and what is not as by default, "glow, depth=4, dequantization=variational"."""
        others = ((each.name, getattr(self, each.name), each.default) for each in fields(self)[2:])
        changed = [*self.options, *((name, value) for name, value, default in others if value != default)]
        text = (",".join(map(str, value)) if isinstance(value, tuple) else str(value).lower() for _, value in changed)
        return ", ".join([self.name, *(f"{name}={value}" for (name, _), value in zip(changed, text, strict=True))])


def defaults_for(flow: str, data: object) -> dict[str, Any]:
    """Returns the defaults of a run of a family on these data; on a demonstration it has a schedule that suits both.

    What is not generated is learnt by heart in more epochs than its own, which are those of every family there.
    """
    demonstration = DEMONSTRATIONS.get(data) if isinstance(data, str) else None
    if demonstration is None:
        return DEFAULTS
    family = FAMILIES.get(flow)
    if family is None or demonstration.kind == "images":
        return {**DEFAULTS, "epochs": demonstration.epochs}
    passes = family.passes if demonstration.generated else 1
    return {**DEFAULTS, "epochs": math.ceil(demonstration.epochs * passes), "lr": family.lr}
