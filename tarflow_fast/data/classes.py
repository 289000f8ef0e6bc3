"""Classes of data and of a model meet by name, and by number only where the data has no names."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import ArgumentError, TarFlowWarning
from .image_data import ImageData

MOST_LISTED = 20


def _listed(names: Sequence[str]) -> str:
    """Returns names as a message shows them."""
    more = ", …" if len(names) > MOST_LISTED else ""
    return ", ".join(map(repr, names[:MOST_LISTED])) + more


def same_form(name: str) -> str:
    """Returns the name in Unicode's composed form: file systems differ in how they store accents."""
    return unicodedata.normalize("NFC", name)


def renamed(data: ImageData, names: Sequence[str], argument: str = "class_names") -> ImageData:
    """Returns the data with these names for its classes, in order.

    Raises ArgumentError that names the argument for data without labels, and for a name that the data has for another
    class: to reorder the list would give images wrong labels.
    """
    if data.labels is None:
        raise ArgumentError(argument, "no names, as the data has no labels", _listed(names))
    own = data.names or ()
    for label, name in enumerate(map(same_form, names)):
        if name in own and own.index(name) != label:
            expected = f"names in the order of the data's own classes, {_listed(own)}"
            raise ArgumentError(argument, expected, f"{name!r} for {own[label]!r}" if label < len(own) else repr(name))
    return replace(data, class_names=tuple(names))


def matched(
    data: ImageData,
    names: Sequence[str] | None,
    num_classes: int,
    argument: str = "data",
    aliases: Sequence[str] = (),
) -> ImageData:
    """Returns the data with the labels and class names of a model; without labels for a model without classes.

    names: the names of the model's classes, or None where it has none. num_classes: the number of these. aliases: other
    names of the model's classes, in their order.

    Where the data has names, each must be the model's. Where it has none, its numbers are the model's labels, or the
    model's names where these are numbers. A model without names takes the data's classes in their order, if there are
    as many. Data without labels stays without. Raises ArgumentError that names the argument.
    """
    if data.labels is None or num_classes == 0:
        return replace(data, labels=None, class_names=None, numbers=None)
    table = _table(data, data.labels, names or (), num_classes, argument, aliases)
    labels = torch.tensor(table)[data.labels]
    return replace(data, labels=labels, class_names=None if names is None else tuple(names), numbers=None)


def _table(
    data: ImageData, labels: Tensor, names: Sequence[str], num_classes: int, argument: str, aliases: Sequence[str]
) -> list[int]:
    """Returns the model's class for each class of the data."""
    known = {same_form(name): k for k, name in [*enumerate(aliases), *enumerate(names)]}
    if data.class_names is not None and names:
        return _by_name(data.class_names, known, names, argument)
    if data.class_names is not None:
        if len(data.class_names) != num_classes:
            raise ArgumentError(
                argument,
                f"{num_classes} classes, as the model has no names by which to find others",
                f"{len(data.class_names)}: {_listed(data.class_names)}",
            )
        said = f"the model has no class names; its classes are taken to be, in order: {_listed(data.class_names)}"
        warnings.warn(said, TarFlowWarning, stacklevel=2)
        return list(range(num_classes))
    numbers = list(data.numbers or range(data.num_classes))
    if any(given and all(name.isdecimal() for name in given) for given in (names, aliases)):
        present = set(labels.tolist())  # where labels are 0, 1, …, classes between them may have no image
        wanted = [str(number) if label in present else None for label, number in enumerate(numbers)]
        return _by_name(wanted, known, names or aliases, argument)
    highest = numbers[int(labels.max())]
    if highest >= num_classes:
        raise ArgumentError(argument, f"labels of {num_classes} classes", f"label {highest}")
    return numbers


def _by_name(wanted: Sequence[str | None], known: dict[str, int], names: Sequence[str], argument: str) -> list[int]:
    """Returns the model's class for each wanted name, −1 for None, which is a class without images."""
    unknown = [name for name in wanted if name is not None and same_form(name) not in known]
    if unknown:
        raise ArgumentError(argument, f"classes that the model knows ({_listed(names)})", _listed(unknown))
    return [-1 if name is None else known[same_form(name)] for name in wanted]
