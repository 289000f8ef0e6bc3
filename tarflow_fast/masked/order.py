"""In which order a masked network can be inverted, read off its masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArgumentError

Wiring = tuple[Tensor, int, int | None]
"""The mask of a layer, (O, I) bool, the number of the value that it reads, and of the one that it adds, or None."""


@dataclass(frozen=True)
class Order:
    """The steps of an inverse: in step s the dimensions with step s become known, all at once.

    Attributes:
        steps: S, the number of steps.
        dims: (D,) int64, the step in which each dimension becomes known: 0 for those that depend on no other.
        units: For each layer but the last, (O,) int64, the first step in which the unit can be evaluated: 0 if it
            depends on no dimension, else one more than the last step of those that it depends on. That of a unit that
            no parameter needs may be S.
    """

    steps: int
    dims: Tensor
    units: tuple[Tensor, ...]


def order_of(features: int, wiring: Sequence[Wiring], dims: Sequence[int], parameters: int, name: str) -> Order:
    """Returns the order in which a masked transform is inverted.

    Args:
        features: D, the number of dimensions.
        wiring: The wiring of each layer.
        dims: The dimensions that are transformed.
        parameters: P, the number of outputs of the last layer for each of them.
        name: What the transform is called in an error.

    Returns:
        The order with the fewest steps.

    Raises:
        ArgumentError: Some dimension depends on itself.
    """
    reach = [torch.eye(features, dtype=torch.bool)]  # (units, D), whether a unit of a value depends on a dimension
    for number, (mask, source, add) in enumerate(wiring, 1):
        added = None if add is None else reach[add]
        mask = mask.cpu()
        if number == len(wiring):  # of what a dimension's parameters depend on, together
            together = (len(dims), parameters)
            mask = mask.unflatten(0, together).any(1)
            added = None if added is None else added.unflatten(0, together).any(1)
        depends = mask.float() @ reach[source].float() > 0
        reach.append(depends if added is None else depends | added)
    needs = torch.zeros(features, features, dtype=torch.bool)
    needs[list(dims)] = reach[-1]
    known = torch.full((features,), -1, dtype=torch.int64)
    step, missing = 0, needs.sum(1)  # how many of the dimensions that each depends on are not known yet
    while (known < 0).any():
        ready = torch.nonzero((known < 0) & (missing == 0))[:, 0]
        if not len(ready):
            stuck = [int(i) for i in torch.nonzero(known < 0)[:3, 0]]
            raise ArgumentError(
                f"the masks of {name}", "that no dimension depends on itself", f"a circle among dimensions {stuck}…"
            )
        known[ready] = step
        missing -= needs[:, ready].sum(1)
        step += 1
    last = [torch.where(depends, known, -1).amax(1) + 1 for depends in reach[1:-1]]
    return Order(step, known, tuple(last))
