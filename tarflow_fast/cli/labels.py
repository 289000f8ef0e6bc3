"""The option --labels says which classes are drawn."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ..models.tarflow import TarFlow
    from ..sampling.labels import LabelsByNumber

MOST_LISTED = 10  # so many names are printed
MOST_BYTES = 2**26  # a file of names or labels may be so large

_QUOTED = re.compile(r'"((?:[^"]|"")*)"\s*(?:,|$)')
_WORD = re.compile(r"([^,]*?)\s*(?:,|$)")
_NUMBER = re.compile(r"#(\d{1,18})|(-?\d{1,18})")
_FLOAT = re.compile(r"-?\d{1,18}\.\d*(?:e[+-]?\d{1,2})?", re.ASCII | re.IGNORECASE)  # as programs write numbers
_RANGE = re.compile(r"(#?)(\d{1,18})\s*-\s*(#?)(\d{1,18})")


@dataclass(frozen=True)
class Chosen:
    """A `Chosen` holds the labels that a run draws.

    labels: what `Sampler.stream` takes as its labels. entries: the labels that come in turn, image i having entry i mod
    their number, or None if they do not come in turn. described: the labels in words, or None for a model without
    classes.
    """

    labels: LabelsByNumber
    entries: list[int] | None
    described: str | None


def choose(text: str | None, model: TarFlow, seed: int) -> Chosen:
    """Returns the labels of a TarFlow that --labels asks for, as `choose_of`."""
    from ..flow import known_names

    return choose_of(text, known_names(model.metadata), model.config.num_classes, seed)


def choose_of(text: str | None, names: Sequence[str], classes: int, seed: int) -> Chosen:
    """Returns the labels that --labels asks for, or, without it, all classes in turn.

    names: the names of the classes, or none. classes: their number. Raises click.UsageError for a class that is not
    known, and ArgumentError for a number that the model does not have.
    """
    from ..checks import find_class
    from ..sampling.noise import random_label

    word = None if text is None else text.strip()
    special = None if word is None or find_class(word, names) is not None else word.casefold()
    if special in ("all", "balanced", "random") and classes == 0:
        raise _wrong("this model has no classes")
    if word is None or special in ("all", "balanced"):
        return Chosen(list(range(classes)) or None, list(range(classes)), f"all {classes} in turn" if classes else None)
    if special == "none":
        return Chosen(None, [], "none" if classes else None)
    if special == "random":
        return Chosen(lambda image: random_label(seed, image, classes), None, f"random ones of {classes}")
    if special is not None and special.startswith("@") and special.endswith(".npz"):
        assert word is not None
        entries = _of_archive(word[1:], names, classes)
    elif special is not None and special.startswith("@"):
        assert word is not None
        entries = [y for line in read_lines(word[1:], "--labels") for y in _labels(line, names, classes)]
    else:
        entries = [y for part in _split(word, names) for y in _labels(part, names, classes)]
    if not entries:
        raise _wrong("expected at least one class")
    entries = [max(y, -1) for y in entries]
    listed = ", ".join(label_name(y, names) for y in entries[:MOST_LISTED])
    more = f", … ({len(entries)} in turn)" if len(entries) > MOST_LISTED else " in turn" if len(entries) > 1 else ""
    return Chosen(entries, entries, listed + more)


def label_name(label: int, names: Sequence[str]) -> str:
    """Returns the name of a class, or its number where it has no name."""
    if label < 0:
        return "no class"
    return names[label] if label < len(names) else str(label)


def read_lines(path: str, option: str) -> list[str]:
    """Returns the lines of a UTF-8 file without the space around them; empty ones are passed over."""
    with Path(path).open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise click.UsageError(f"{option}: {path!r} has more than {MOST_BYTES} bytes")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise click.UsageError(f"{option}: {path!r} is no text in UTF-8") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _of_archive(path: str, names: Sequence[str], classes: int) -> list[int]:
    """Returns the labels of the images of a .npz file, where they are called `labels`, or `arr_1` as in ADM's files."""
    import numpy as np

    from ..checks import label_tensor

    try:
        with np.load(path, allow_pickle=False) as file:
            found = next((file[name] for name in ("labels", "arr_1") if name in file.files), None)
    except (ValueError, zipfile.BadZipFile) as error:
        raise _wrong(f"{path!r} is no .npz file of numbers or names") from error
    if found is None:
        raise _wrong(f"{path!r} has no list of labels, which it would call labels or arr_1")
    labels = label_tensor(found, classes, class_names=names)
    return [] if labels is None else labels.tolist()


def split_list(text: str) -> list[str]:
    """Returns the words of "a, b,c"; a word that holds a comma stands in quotation marks, as in CSV."""
    return _split(text, [])


def _wrong(what: str) -> click.BadParameter:
    return click.BadParameter(what, param_hint="'--labels'")


def _split(text: str, names: Sequence[str]) -> list[str]:
    """Returns the words between commas, of which the last may end the text.

    A class name that holds commas is one word, as is what is quoted.
    """
    known = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True) if name)
    name = re.compile(rf"({known})\s*(?:,|$)", re.IGNORECASE) if known else None
    words, rest = [], text.strip()
    while True:
        found = (name.match(rest) if name else None) or _QUOTED.match(rest) or _WORD.match(rest)
        assert found is not None  # _WORD matches everything
        words.append(found[1].replace('""', '"') if found.re is _QUOTED else found[1])
        rest = rest[found.end() :].lstrip()
        if not rest:
            return words


def _labels(word: str, names: Sequence[str], classes: int) -> list[int]:
    """Returns the labels that one word of a list stands for: a class name, a number, or a range of either."""
    from ..checks import find_class
    from ..errors import ArgumentError

    named = find_class(word, names)
    if named is not None:
        return [named]
    if found := _NUMBER.fullmatch(word):
        low = high = int(found[1] or found[2])
    elif _FLOAT.fullmatch(word) and float(word).is_integer():
        low = high = int(float(word))
    elif found := _RANGE.fullmatch(word):
        low, high = int(found[2]), int(found[4])
        if low > high:
            raise _wrong(f"the range {word!r} runs backwards")
        if not (found[1] or found[3]) and (of_names := _range_of_names(word, low, high, names)):
            return of_names
    elif word.casefold() == "none":
        low = high = -1
    elif not word:
        raise _wrong("an entry of the list is empty, and there is no class ''")
    else:
        known = ", ".join(map(repr, names[:20])) + (", …" if len(names) > 20 else "")
        raise _wrong(f"there is no class {word!r} (class names of this model: {known or 'none, so give numbers'})")
    if high >= classes:
        expected = f"classes below {classes}" if classes else "none, as this model has no classes"
        raise ArgumentError("labels", f"{expected}, or negative for no class", word)
    return list(range(low, high + 1))


def _range_of_names(word: str, low: int, high: int, names: Sequence[str]) -> list[int]:
    """Returns the classes whose names are numbers from low to high; none where neither of these two is a name."""
    numbers = sorted((int(name), label) for label, name in enumerate(names) if re.fullmatch(r"\d{1,18}", name))
    ends = {low, high} & {number for number, _ in numbers}
    if ends and ends != {low, high}:
        raise _wrong(
            f"one end of the range {word!r} is the name of a class, the other is not; for numbers #{low}-#{high}"
        )
    return [label for number, label in numbers if ends and low <= number <= high]
