"""Which label an image has: a matter of its number alone, so that runs can continue each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import Label, Labels, label_tensor

LabelsByNumber = Labels | Callable[[int], Label]
"""None, a label, a sequence or tensor of which image i takes entry i mod its length, or a function of i. A label is an
int, negative for no class, or the name of a class."""


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
        return self._table[torch.tensor([number % period for number in numbers], device="cpu")]

    def _tensor(self, labels: Any) -> Tensor | None:
        table = label_tensor(labels, self._num_classes, class_names=self._names)
        return None if table is None else table.cpu()
