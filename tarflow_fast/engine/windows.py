"""Checks of the tokens that a pass is over: the arguments `start` and `stop` of the engine contract."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import ArgumentError

Bounds = int | Sequence[int]
"""The starts or the stops of a parallel pass: one number for all samples, or one for each."""


def check_part(start: int, stop: int, tokens: int) -> None:
    """Raises ArgumentError unless 1 <= start <= stop <= T, as a sequential pass needs."""
    if not _fits(start, stop, tokens):
        raise ArgumentError("start, stop", f"integers with 1 <= start <= stop <= {tokens}", (start, stop))


def check_window(start: Bounds, stop: Bounds, tokens: int) -> tuple[int, int]:
    """Returns the start and the stop of a parallel pass over one window. Raises ArgumentError unless 1 <= start < stop
    <= T.
    """
    if isinstance(start, int) and isinstance(stop, int) and start < stop and _fits(start, stop, tokens):
        return start, stop
    raise ArgumentError("start, stop", f"integers with 1 <= start < stop <= {tokens}", (start, stop))


def check_windows(start: Bounds, stop: Bounds, batch: int, tokens: int) -> tuple[Sequence[int], Sequence[int]]:
    """Returns B starts and B stops of a parallel pass. Raises ArgumentError unless 1 <= start[b] <= stop[b] <= T."""
    if (
        isinstance(start, Sequence)
        and isinstance(stop, Sequence)
        and len(start) == len(stop) == batch
        and all(_fits(*window, tokens) for window in zip(start, stop, strict=True))
    ):
        return start, stop
    expected = f"integers with 1 <= start < stop <= {tokens}, or {batch} of each with 1 <= start <= stop <= {tokens}"
    raise ArgumentError("start, stop", expected, (start, stop))


def _fits(start: object, stop: object, tokens: int) -> bool:
    return isinstance(start, int) and isinstance(stop, int) and 1 <= start <= stop <= tokens
