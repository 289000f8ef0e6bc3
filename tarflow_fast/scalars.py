"""Numbers and flags as people have them: Python's own, numpy's, and tensors and arrays without dimensions."""

from __future__ import annotations

from typing import Any

from .errors import ArgumentError


def plain(value: Any) -> Any:
    """Returns the Python number in a numpy scalar, or in a tensor or array without dimensions; else the value."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item") and str(getattr(value, "device", "")) != "meta":
        return value.item()
    return value


def check_flag(name: str, value: object) -> bool:
    """Returns a flag as a bool, which may be 0 or 1 as command lines have it.

    Raises ArgumentError for anything else.
    """
    flag = plain(value)
    if not isinstance(flag, (bool, int)) or flag not in (0, 1):
        raise ArgumentError(name, "a bool", repr(value))
    return bool(flag)
