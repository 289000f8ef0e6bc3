"""The rational-quadratic splines of nflows and normflows, whose transforms keep the same sizes under the same names."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..errors import ArgumentError
from ..masked import Spline
from ..spline import SplineLaw


def spline_of(law: Callable[..., SplineLaw], module: Any, name: str, hidden: int, bins: int | None = None) -> Spline:
    """Returns the spline of a rational-quadratic transform.

    Args:
        law: The library's law, `SplineLaw.nflows` or `SplineLaw.normflows`.
        module: The transform.
        name: What an error calls it.
        hidden: The network's `hidden_features`, or 1.
        bins: The number of bins, by default the transform's `num_bins`.

    Raises:
        ArgumentError: The transform has other tails than linear ones.
    """
    if module.tails not in ("linear", None):
        raise ArgumentError(f"layer {name!r}", "linear tails, or none", repr(module.tails))
    return Spline(
        law(
            module.num_bins if bins is None else bins,
            float(module.tail_bound) if module.tails else None,
            min_bin_width=module.min_bin_width,
            min_bin_height=module.min_bin_height,
            min_derivative=module.min_derivative,
            divisor=math.sqrt(hidden),
        )
    )
