"""Demonstration data by name, small enough that every family learns them in minutes on a laptop."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError

TRAIN, TEST = 20_000, 5_000  # samples of what is generated
HELD_OUT = 5  # every fifth row of a package's table is held out
TEXT_LENGTH, DNA_LENGTH = 32, 32
LETTERS = " abcdefghijklmnopqrstuvwxyz"
BASES = "ACGT"
MOTIF = "TATAAA"  # the box that many genes begin with


@dataclass(frozen=True)
class Arrays:
    """Samples as numpy has them. values: (N, …). labels: (N,) integers or None."""

    values: NDArray[Any]
    labels: NDArray[Any] | None = None
    class_names: tuple[str, ...] | None = None
    symbols: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Demonstration:
    """A row of the table.

    Attributes:
        kind: The kind of data, one of `flow_data.KINDS`.
        what: What the data are, in a phrase.
        epochs: How many passes over the data a run makes unless it is told another number.
        make: A function of the split, "train" or "test", that returns the samples.
        generated: Whether the samples are drawn from a law, many enough that no model learns them by heart.
    """

    kind: str
    what: str
    epochs: int
    make: Callable[[str], Arrays]
    generated: bool = True


def _generated(draw: Callable[[np.random.Generator, int], Arrays]) -> Callable[[str], Arrays]:
    """Returns the function of the split that draws from one seed for training and from another for the test."""
    return lambda split: draw(np.random.default_rng(1 if split == "train" else 2), TRAIN if split == "train" else TEST)


def _moons(rng: np.random.Generator, n: int) -> Arrays:
    label, angle = rng.integers(0, 2, n), rng.uniform(0, math.pi, n)
    x = np.stack([np.cos(angle), np.sin(angle)], 1) * np.where(label, -1, 1)[:, None]
    x += np.where(label[:, None], [0.5, -0.25], [-0.5, -0.25])
    return Arrays(1.6 * x + rng.normal(0, 0.12, (n, 2)), label)


def _rings(rng: np.random.Generator, n: int) -> Arrays:
    label, angle = rng.integers(0, 3, n), rng.uniform(0, 2 * math.pi, n)
    radius = 0.8 * (label + 1) + rng.normal(0, 0.08, n)
    return Arrays(radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1), label)


def _checkerboard(rng: np.random.Generator, n: int) -> Arrays:
    column = rng.integers(0, 4, n)
    row = 2 * rng.integers(0, 2, n) + column % 2
    return Arrays(np.stack([column, row], 1) - 2 + rng.uniform(0, 1, (n, 2)))


def _pinwheel(rng: np.random.Generator, n: int) -> Arrays:
    label = rng.integers(0, 5, n)
    along, across = 1 + rng.normal(0, 0.3, n), rng.normal(0, 0.1, n)
    angle = 2 * math.pi * label / 5 + 0.25 * np.exp(along)
    turned = [along * np.cos(angle) - across * np.sin(angle), along * np.sin(angle) + across * np.cos(angle)]
    return Arrays(1.8 * np.stack(turned, 1), label)


def _eight_gaussians(rng: np.random.Generator, n: int) -> Arrays:
    label = rng.integers(0, 8, n)
    centres = 2.2 * np.stack([np.cos(label * math.pi / 4), np.sin(label * math.pi / 4)], 1)
    return Arrays(centres + rng.normal(0, 0.22, (n, 2)), label)


def _spirals(rng: np.random.Generator, n: int) -> Arrays:
    label, turn = rng.integers(0, 2, n), np.sqrt(rng.uniform(0.03, 1, n)) * 3 * math.pi
    x = np.stack([-np.cos(turn), np.sin(turn)], 1) * (turn / (3 * math.pi))[:, None] * np.where(label, -1, 1)[:, None]
    return Arrays(2.8 * x + rng.normal(0, 0.07, (n, 2)), label)


def _sphere(rng: np.random.Generator, n: int) -> Arrays:
    """A band around a tilted great circle, and two caps."""
    label = rng.integers(0, 3, n)
    angle, wobble = rng.uniform(0, 2 * math.pi, n), rng.normal(0, 0.1, n)
    tilt = np.array([[1, 0, 0], [0, math.cos(0.6), -math.sin(0.6)], [0, math.sin(0.6), math.cos(0.6)]])
    band = np.stack([np.cos(angle), np.sin(angle), wobble], 1) @ tilt.T
    poles = tilt @ np.array([[0, 0], [0, 0], [1, -1]])
    caps = poles.T[np.clip(label - 1, 0, 1)] + rng.normal(0, 0.2, (n, 3))
    x = np.where((label == 0)[:, None], band, caps)
    return Arrays(x / np.linalg.norm(x, axis=1, keepdims=True), label)


def _torus(rng: np.random.Generator, n: int) -> Arrays:
    """Angles like a protein's backbone: three clouds, one of which lies across the seam, where 2π is 0."""
    label = rng.choice(3, n, p=[0.5, 0.3, 0.2])
    centres = np.array([[4.1, 5.1], [4.2, 2.3], [0.1, 0.4]])[label]
    noise = rng.normal(0, 1, (n, 2)) @ np.array([[0.35, -0.2], [0.0, 0.3]])
    return Arrays((centres + noise) % (2 * math.pi), label)


def _dna(rng: np.random.Generator, n: int) -> Arrays:
    """Chains in which each base depends on the two before it, with a TATA box somewhere in every one."""
    law = np.random.default_rng(0).dirichlet([0.4] * len(BASES), (len(BASES), len(BASES))).cumsum(-1)
    x = rng.integers(0, len(BASES), (n, DNA_LENGTH))
    for t in range(2, DNA_LENGTH):
        x[:, t] = (rng.uniform(0, 1, (n, 1)) > law[x[:, t - 2], x[:, t - 1]]).sum(1).clip(0, len(BASES) - 1)
    starts = rng.integers(0, DNA_LENGTH - len(MOTIF) + 1, n)
    for k, base in enumerate(MOTIF):
        x[np.arange(n), starts + k] = BASES.index(base)
    return Arrays(x, symbols=tuple(BASES))


def _text(split: str) -> Arrays:
    """Windows of scikit-learn's descriptions of its data sets, in lower-case letters; the last fifth is held out."""
    _sklearn()
    folder = files("sklearn.datasets") / "descr"
    names = sorted(each.name for each in folder.iterdir() if each.name.endswith(".rst"))
    text = " ".join((folder / name).read_text(encoding="utf-8") for name in names).lower()
    letters = re.sub(r"[^a-z]+", " ", text)
    cut = len(letters) * (HELD_OUT - 1) // HELD_OUT
    part = letters[:cut] if split == "train" else letters[cut:]
    codes = np.array([LETTERS.index(letter) for letter in part])
    windows = np.lib.stride_tricks.sliding_window_view(codes, TEXT_LENGTH)
    return Arrays(windows[:: 3 if split == "train" else TEXT_LENGTH], symbols=tuple(LETTERS))


def _digits(split: str) -> Arrays:
    """Handwritten digits of 8×8 pixels; their 17 levels are spread over 256 with a fixed dither."""
    found = _sklearn().load_digits()
    noise = np.random.default_rng(0).uniform(0, 1, found.images.shape)
    images = np.floor((found.images + noise) * (256 / 17)).clip(0, 255)[:, None]
    return _held_out(split, images, found.target, tuple(map(str, range(10))))


def _table(name: str) -> Callable[[str], Arrays]:
    """Returns the function of the split that reads a table of scikit-learn, its columns on a standard scale."""

    def make(split: str) -> Arrays:
        found = getattr(_sklearn(), f"load_{name}")()
        x = found.data
        train = _held_out("train", x, found.target, None).values
        return _held_out(split, (x - train.mean(0)) / train.std(0), found.target, tuple(map(str, found.target_names)))

    return make


def _held_out(split: str, x: NDArray[Any], y: NDArray[Any], names: tuple[str, ...] | None) -> Arrays:
    order = np.random.default_rng(0).permutation(len(x))
    test = np.arange(len(x)) % HELD_OUT == 0
    rows = order[~test if split == "train" else test]
    return Arrays(x[rows], y[rows], names)


def _sklearn() -> Any:
    try:
        import sklearn.datasets
    except ImportError as error:
        said = "scikit-learn, which has these data, is not installed; pip install 'tarflow_fast[flows]' brings it"
        raise DataError(said) from error
    return sklearn.datasets


DEMONSTRATIONS: dict[str, Demonstration] = {
    "moons": Demonstration("vectors", "two half moons", 25, _generated(_moons)),
    "rings": Demonstration("vectors", "three rings", 25, _generated(_rings)),
    "checkerboard": Demonstration("vectors", "the eight black fields of a 4×4 board", 25, _generated(_checkerboard)),
    "pinwheel": Demonstration("vectors", "five bent arms", 25, _generated(_pinwheel)),
    "eight-gaussians": Demonstration("vectors", "eight Gaussians on a circle", 25, _generated(_eight_gaussians)),
    "spirals": Demonstration("vectors", "two spirals", 25, _generated(_spirals)),
    "wine": Demonstration("vectors", "13 measurements of 178 wines", 60, _table("wine"), generated=False),
    "breast-cancer": Demonstration(
        "vectors", "30 measurements of 569 tumours", 200, _table("breast_cancer"), generated=False
    ),
    "digits": Demonstration("images", "1,797 handwritten digits of 8×8 pixels", 150, _digits, generated=False),
    "dna": Demonstration("tokens", "chains of 32 bases with a TATA box in each", 20, _generated(_dna)),
    "text": Demonstration("tokens", "windows of 32 letters of English text", 40, _text, generated=False),
    "sphere": Demonstration("sphere", "a band and two caps on the unit sphere", 25, _generated(_sphere)),
    "torus": Demonstration("torus", "three clouds of pairs of angles", 25, _generated(_torus)),
}
"""The data by name."""
