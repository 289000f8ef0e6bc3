"""These functions tell what the numbers of an array mean as pictures, and which axis has the channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError

LAYOUTS = ("auto", "NHWC", "NCHW", "tokens")
VALUES = ("auto", "0..1", "-1..1", "0..255", "raw")
PICTURE_CHANNELS = (1, 3)
WITH_ALPHA = {2: "LA", 4: "RGBA"}
OVERSHOOT = 0.01  # resizing and rounding go so far beyond 0..1 or -1..1
DARKEST = 16.0  # floats whose brightest value is no less can only be 0 to 255


@dataclass(frozen=True)
class Range:
    """A `Range` has the least and the largest of all values. finite: whether none is infinite or NaN."""

    low: float
    high: float
    finite: bool = True

    @classmethod
    def of(cls, values: NDArray[Any]) -> Range:
        low, high = float(values.min()), float(values.max())
        return cls(low, high, bool(np.isfinite(low) and np.isfinite(high)))

    def __or__(self, other: Range) -> Range:
        return Range(min(self.low, other.low), max(self.high, other.high), self.finite and other.finite)


def channel_axis(where: str, dtype: np.dtype[Any], shape: tuple[int, ...], layout: str) -> int | None:
    """Returns the axis of the channels: 1 for (N, ch, H, W), 3 for (N, H, W, ch), None for (N, H, W).

    Without a layout a reading of the shape counts if it gives images of 1 or 3 channels, or square ones. Raises
    DataError where both readings count, or neither.
    """
    if len(shape) == 3:
        return None
    if len(shape) != 4:
        raise DataError(f"{where}: expected images (N, H, W), (N, H, W, ch) or (N, ch, H, W), got {dtype} {shape}")
    _, a, b, c = shape
    if layout != "auto":
        return 3 if layout == "NHWC" else 1
    first, last = a in PICTURE_CHANNELS or b == c, c in PICTURE_CHANNELS or a == b
    if first == last and not a == b == c == 1:
        why = "may be" if first else "has neither 1 or 3 channels nor square images, to tell whether it is"
        raise DataError(f"{where}: {shape} {why} (N, H, W, ch) or (N, ch, H, W): give layout, 'NHWC' or 'NCHW'")
    return 3 if last else 1


def check_sequences(where: str, dtype: np.dtype[Any], shape: tuple[int, ...], found: Range | None, values: str) -> None:
    """Raises DataError for what are no sequences (N, T, D) of finite floats. found: the range of values, if known."""
    if len(shape) != 3:
        raise DataError(f"{where}: expected sequences (N, T, D), got {dtype} {shape}")
    if dtype.kind != "f":
        raise DataError(f"{where}: expected sequences of floats, got {dtype}")
    if values not in ("auto", "raw"):
        raise DataError(f"{where}: expected values 'raw', as sequences are kept as they are, got {values!r}")
    if found is not None and not found.finite:
        raise DataError(f"{where}: expected finite sequences, got infinities or NaNs")


def meaning(where: str, dtype: np.dtype[Any], channels: int, found: Range | None, values: str, sampled: bool) -> str:
    """Returns what the numbers are: one of VALUES, but not "auto".

    found: the range of all values, where they are no uint8. sampled: whether `tarflow-fast sample` has written the
    file: its pictures are about -1 to 1. Raises DataError where it cannot be told.
    """
    if dtype == np.uint8:
        if values not in ("auto", "0..255"):
            raise DataError(f"{where}: expected floats for values {values!r}, got uint8, which is 0..255")
        return "0..255"
    if dtype.kind not in "fiub":
        raise DataError(f"{where}: expected images of numbers, got {dtype}")
    assert found is not None
    if not found.finite:
        raise DataError(f"{where}: expected finite images, got infinities or NaNs")
    span = f"{dtype} images from {found.low:g} to {found.high:g}"
    if dtype.kind != "f":
        if values not in ("auto", "0..255") and dtype.kind != "b":
            raise DataError(f"{where}: expected floats for values {values!r}, got {dtype}")
        if not (found.low >= 0 and found.high <= 255):
            raise DataError(f"{where}: expected whole numbers from 0 to 255, got {span}")
        return "0..1" if dtype.kind == "b" else "0..255"
    if values != "auto":
        low, high = {"0..1": (0.0, 1.0), "-1..1": (-1.0, 1.0), "0..255": (0.0, 255.0)}.get(values, (-np.inf, np.inf))
        slack = OVERSHOOT * (high - low) if values != "raw" else 0.0
        if not sampled and not (found.low >= low - slack and found.high <= high + slack):
            raise DataError(f"{where}: expected values {values!r}, got {span}")
        return values
    if channels not in PICTURE_CHANNELS:
        return "raw"
    if sampled:
        return "-1..1"
    if found.low >= -OVERSHOOT and OVERSHOOT < found.high <= 1 + OVERSHOOT:
        return "0..1"
    if -1 - OVERSHOOT <= found.low < -OVERSHOOT and found.high <= 1 + OVERSHOOT:
        return "-1..1"
    if found.low >= 0 and DARKEST <= found.high <= 255:
        return "0..255"
    raise DataError(
        f"{where}: {span}: say what is black and white by values, one of {', '.join(map(repr, VALUES[1:]))} "
        "(raw: no pictures, but numbers that the model takes as they are; "
        "layout='tokens': the same for sequences (N, T, D))"
    )


def converted(values: NDArray[Any], what: str) -> NDArray[Any]:
    """Returns values as 8-bit ones, rounded, or for "raw" as float32. what: their meaning, one of VALUES."""
    if what == "raw":
        return values.astype(np.float32)
    if what == "0..255" and values.dtype.kind != "f":
        return values.astype(np.uint8)
    x = values.astype(np.float32)
    x = {"0..1": lambda: x * 255, "-1..1": lambda: (x + 1) * np.float32(127.5), "0..255": lambda: x}[what]()
    return np.rint(np.clip(x, 0, 255)).astype(np.uint8)
