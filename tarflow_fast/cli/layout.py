"""A layout says how the images of a run lie in its grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

PER_CLASS = 8  # so many images of each class are drawn, unless -n tells
MOST_ROWS = 20  # classes get a row each where there are no more
PIXELS = 96  # pictures of smaller images are enlarged towards this side
MOST_PIXELS = 2**26  # enlarging never gives a grid more


@dataclass(frozen=True)
class Layout:
    """A `Layout` gives each image a cell of the grid: in the order of their numbers, or a row for each class.

    columns: the number of images in a row, in the order of their numbers, or None for as many as make a square.
    classes: if not None, image number i is of class i mod classes, each class has a row, and columns is None.
    """

    columns: int | None = None
    classes: int | None = None

    def size(self, first: int, count: int) -> tuple[int, int]:
        """Returns (cells, columns) of the grid of the images numbered first … first+count−1."""
        if self.classes is None:
            return count, self.columns or math.isqrt(count - 1) + 1
        columns = -(-(first + count) // self.classes) - first // self.classes
        return self.classes * columns, columns

    def places(self, first: int, count: int) -> Sequence[int]:
        """Returns the cell of each image numbered first … first+count−1, where cells are counted row after row."""
        if self.classes is None:
            return range(count)
        _, columns = self.size(first, count)
        begin = first // self.classes
        return [i % self.classes * columns + i // self.classes - begin for i in range(first, first + count)]


def layout(n: int, entries: Sequence[int] | None, columns: int | None) -> Layout:
    """Returns the layout of n images.

    Each class has a row where `columns` is None and classes come in turn, are few, and fewer than images; else images
    lie in rows of `columns`, or without it in a square, if need be with gaps.
    """
    classes = 0 if entries is None else len(entries)
    if columns is None and 1 < classes <= MOST_ROWS and n > classes:
        return Layout(classes=classes)
    return Layout(columns)


def default_count(entries: Sequence[int] | None, asked: bool) -> int:
    """Returns how many images to draw by default: a row of each class, or one of each of many that were asked for."""
    classes = 0 if entries is None else len(entries)
    if 0 < classes <= MOST_ROWS:
        return PER_CLASS * classes
    return max(classes, PER_CLASS**2) if asked else PER_CLASS**2


def default_scale(cells: int, columns: int, height: int, width: int) -> int:
    """Returns the scale that enlarges small images to about PIXELS pixels while the grid stays within MOST_PIXELS."""
    from ..images import grid_size

    scale = max(1, PIXELS // max(height, width))
    while scale > 1 and math.prod(grid_size(cells, height, width, columns, 2, scale)) > MOST_PIXELS:
        scale -= 1
    return scale
