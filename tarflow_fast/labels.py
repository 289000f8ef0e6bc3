"""Which label an image has: a matter of its number alone, so that runs can continue each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import Labels, label_tensor
from .errors import ArgumentError

LabelsByNumber = Labels | str | Sequence[int | str] | Callable[[int], int | str]
"""None, a label, a sequence or tensor of which image i takes entry i mod its length, or a function of i. A label is an
int, negative for no class, or the name of a class."""


def known_names(metadata: dict[str, Any]) -> list[str]:
    """The class names that a checkpoint records, in the order of the classes; none if there are none."""
    names = metadata.get("class_names")
    return [str(name) for name in names] if isinstance(names, (list, tuple)) else []


def find_class(name: str, names: Sequence[str]) -> int | None:
    """The number of the class of that name, in any case where none is spelt exactly so; None if there is none.

    Raises ArgumentError where several classes are called that.
    """
    for spelt in (str, str.casefold):
        found = [i for i, known in enumerate(names) if spelt(known) == spelt(name)]
        if len(found) > 1:
            some = ", ".join(map(str, found[:5])) + (", …" if len(found) > 5 else "")
            raise ArgumentError("labels", "the name of one class, or its number", f"{name!r}, as are {some}")
        if found:
            return found[0]
    return None


class LabelRule:
    """Labels by image number: called with numbers, gives (len(numbers),) int64 on the CPU, or None for no labels.

    Raises ArgumentError for labels that the model does not have.
    """

    def __init__(self, labels: LabelsByNumber, num_classes: int, names: Sequence[str]):
        self._num_classes, self._names = num_classes, names
        self._function = labels if callable(labels) and not isinstance(labels, Tensor) else None
        self._table = None if self._function is not None else self._tensor(labels)

    @property
    def none(self) -> bool:
        """Whether it is known that no image has a class."""
        return self._function is None and (self._table is None or bool((self._table < 0).all()))

    def __call__(self, numbers: range | Sequence[int]) -> Tensor | None:
        if self._function is not None:
            return self._tensor([self._function(number) for number in numbers])
        if self._table is None:
            return None
        period = self._table.numel()
        return self._table[torch.tensor([number % period for number in numbers])]

    def _tensor(self, labels: Any) -> Tensor | None:
        if isinstance(labels, str):
            labels = self._number(labels)
        elif isinstance(labels, (list, tuple)):
            labels = [self._number(label) if isinstance(label, str) else label for label in labels]
        table = label_tensor(labels, self._num_classes)
        return None if table is None else table.cpu()

    def _number(self, name: str) -> int:
        found = find_class(name, self._names)
        if found is None:
            some = ", ".join(map(repr, self._names[:20])) + (", …" if len(self._names) > 20 else "")
            raise ArgumentError("labels", f"the name of a class ({some or 'this model records none'})", repr(name))
        return found
