"""A size of two sides is one number where height and width are the same, else (height, width). It needs no torch."""

from __future__ import annotations

from typing import Any

from .errors import ArgumentError
from .scalars import plain

MOST = 2**31 - 1  # no side is longer

Size = int | tuple[int, int]  # one number for a square, or (height, width)


def check_side(name: str, value: object, low: int = 1, high: int = MOST) -> None:
    """Raises ArgumentError unless the value is an integer from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        bound = f"an integer >= {low}" + (f" and <= {high}" if isinstance(value, int) and value > high else "")
        raise ArgumentError(name, bound, repr(value))


def pair(size: Size) -> tuple[int, int]:
    """Returns (height, width)."""
    return (size, size) if isinstance(size, int) else size


def checked_size(name: str, value: Any, high: int = MOST) -> Size:
    """Returns one number for a square, else (height, width). Raises ArgumentError for a value that is neither."""
    value = plain(value)
    if not isinstance(value, (tuple, list)):
        check_side(name, value, 1, high)
        size: int = value
        return size
    sides = tuple(plain(side) for side in value)
    if len(sides) != 2:
        raise ArgumentError(name, "an integer >= 1, or (height, width)", repr(value))
    for side in sides:
        check_side(name, side, 1, high)
    return sides[0] if sides[0] == sides[1] else (sides[0], sides[1])


def by(size: Size) -> str:
    """Returns the size as text, "28×28"."""
    return "{}×{}".format(*pair(size))
