"""The table of families, and `build`, which makes a model of one.

A new family is a file with a subclass of `FamilyFlow`, and its row in `FAMILIES`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ..checks import check_count, kind_of
from ..errors import ArgumentError, BackendError
from .base import FamilyFlow
from .options import read_options

DIMENSIONS = {"vectors": 1, "images": 3, "tokens": 1, "sphere": 1, "torus": 1}
"""The kinds of data, and how many dimensions one sample has: (D,), (channels, height, width), (T,), (D,), (D,)."""

LIBRARIES = ("zuko", "torchdiffeq", "flow_matching", "scipy", "sklearn")  # those of the extra `flows`


@dataclass(frozen=True)
class Family:
    """A row of the table.

    Attributes:
        where: "module.Class", the module being one of this package.
        purpose: What the family is for, in one sentence without a full stop.
        kinds: The kinds of data that it takes, of `DIMENSIONS`.
        lr: The highest learning rate with which it learns demonstrations, but for images.
        passes: How many times the epochs of a demonstration it takes to learn it well, or has time for, where data are
            generated.
    """

    where: str
    purpose: str
    kinds: tuple[str, ...]
    lr: float = 2e-3
    passes: float = 1

    def load(self) -> type[FamilyFlow]:
        """Returns the class. Raises BackendError where a library is missing that the family is made of."""
        module, _, name = self.where.partition(".")
        try:
            return getattr(import_module(f".{module}", __package__), name)
        except ModuleNotFoundError as error:
            library = (error.name or "").partition(".")[0]
            if library not in LIBRARIES:
                raise
            need = f"{name} needs {library}, which is not installed; pip install 'tarflow_fast[flows]' brings it"
            raise BackendError(need) from error


FAMILIES: dict[str, Family] = {
    "nice": Family(
        "nice.NICE",
        "The simplest exact flow: additive couplings that keep volume, and one scale",
        ("vectors", "images"),
        passes=3,
    ),
    "realnvp": Family(
        "realnvp.RealNVP",
        "Fast both ways: affine couplings, for images in several scales",
        ("vectors", "images"),
        passes=3,
    ),
    "glow": Family(
        "glow.Glow",
        "Images fast both ways: affine couplings between learnt mixtures of channels, in several scales",
        ("vectors", "images"),
        passes=2,
    ),
    "maf": Family(
        "maf.MAF",
        "Density estimation: a density in one pass, samples value by value",
        ("vectors", "images"),
        passes=2,
    ),
    "iaf": Family(
        "iaf.IAF",
        "Samples in one pass, a density value by value, for few dimensions",
        ("vectors",),
        passes=3,
    ),
    "spline-coupling": Family(
        "spline.SplineCoupling",
        "Flexible and fast both ways: couplings by splines",
        ("vectors", "images"),
        passes=2,
    ),
    "spline-autoregressive": Family(
        "spline.SplineAutoregressive",
        "The best density of vectors: splines value by value",
        ("vectors", "images"),
        passes=2,
    ),
    "residual": Family(
        "residual.ResidualFlow",
        "Free-form networks, contractions x + g(x) inverted by iteration",
        ("vectors", "images"),
    ),
    "cnf": Family(
        "cnf.CNF",
        "FFJORD: one free-form ODE, trained on its own likelihood",
        ("vectors", "images"),
        lr=5e-3,
        passes=0.3,
    ),
    "flow-matching": Family(
        "flow_matching.FlowMatching",
        "An ODE that is trained without solving it, on straight paths from noise to data",
        ("vectors", "images"),
        lr=5e-3,
        passes=3,
    ),
    "rectified": Family(
        "rectified.RectifiedFlow",
        "Flow matching whose trajectories are straightened, for samples in one step or a few",
        ("vectors", "images"),
        lr=5e-3,
        passes=3,
    ),
    "discrete": Family(
        "discrete.DiscreteFlowMatching",
        "Sequences of tokens, by a Markov chain from masks or noise",
        ("tokens",),
    ),
    "riemannian": Family(
        "riemannian.RiemannianFlowMatching",
        "Points on the sphere or the torus, along geodesics",
        ("sphere", "torus"),
        lr=5e-3,
        passes=3,
    ),
}
"""The families by name, the simplest first."""


def known_one(argument: str, name: object, known: Iterable[str]) -> str:
    """Returns the name if it is known. Raises ArgumentError that lists those that are, and the closest one."""
    names = list(known)
    if isinstance(name, str) and name in names:
        return name
    close = difflib.get_close_matches(str(name), names, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ArgumentError(argument, f"one of {', '.join(names)}{hint}", repr(name))


def build(name: str, *, data_shape: Iterable[int], num_classes: int = 0, **options: Any) -> FamilyFlow:
    """Returns a new model of a family, with random weights.

    Args:
        name: The family, one of `FAMILIES`.
        data_shape: The shape of one sample: (D,) for vectors and points, (channels, height, width) for images, (T,) for
            sequences of tokens.
        num_classes: How many classes the data have; 0 for an unconditional model.
        **options: The options of the family, by the names in its `Options`.

    Raises:
        ArgumentError: There is no such family or option, a value or the shape does not fit, or an option does nothing
            for data of this shape; the message lists those that there are.
        BackendError: The family is made of a library that is not installed.
    """
    family = FAMILIES[known_one("name", name, FAMILIES)]
    shape = check_shape(name, data_shape)
    classes = check_count("num_classes", num_classes, low=0)
    kind = family.load()
    read = read_options(name, kind.Options, options)
    for idle, use in kind.idle_options(shape, read).items():
        if idle in options:
            raise ArgumentError("options", f"{idle!r} with {use} alone, as it does nothing for others", _of(shape))
    model = kind(shape, classes, read)
    model.name = name
    return model


def _of(shape: tuple[int, ...]) -> str:
    return f"data of shape {shape}"


def check_shape(name: str, data_shape: object) -> tuple[int, ...]:
    """Returns the shape of one sample. Raises ArgumentError where the family has no data of that shape."""
    if not isinstance(data_shape, Iterable) or isinstance(data_shape, str):
        raise ArgumentError("data_shape", "the shape of one sample, such as (2,) or (1, 28, 28)", kind_of(data_shape))
    shape = tuple(check_count("data_shape", size) for size in data_shape)
    kinds = FAMILIES[name].kinds
    if len(shape) not in {DIMENSIONS[kind] for kind in kinds}:
        forms = {1: "(size,)", 3: "(channels, height, width)"}
        wanted = " or ".join(forms[d] for d in sorted({DIMENSIONS[kind] for kind in kinds}))
        raise ArgumentError("data_shape", f"{wanted}, as {name!r} takes {' and '.join(kinds)}", shape)
    return shape
