"""The rational-quadratic splines of nflows and normflows, whose transforms keep the same sizes under the same names."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..errors import ArgumentError
from ..masked import Layer, Spline
from ..spline import SplineLaw


def spline_of(law: Callable[..., SplineLaw], module: Any, name: str, hidden: int, bins: int | None = None) -> Spline:
    """Returns the spline of a rational-quadratic transform.

    Args:
        law: The library's law, `SplineLaw.nflows` or `SplineLaw.normflows`.
        module: The transform.
        name: What an error calls it.
        hidden: The network's `hidden_features`, or 1.
        bins: The number of bins, by default the transform's `num_bins`.

    Returns:
        The spline. With circular tails, of all dimensions or of some, its outer derivatives are parameters, see `tied`.

    Raises:
        ArgumentError: The transform has tails that are unknown.
    """
    tails = set(module.tails) if isinstance(module.tails, list | tuple) else {module.tails}
    if not (tails <= {"linear", "circular"} or tails == {None}):
        raise ArgumentError(f"layer {name!r}", "linear or circular tails, or none", repr(module.tails))
    made = Spline(
        law(
            module.num_bins if bins is None else bins,
            float(module.tail_bound) if module.tails else None,
            min_bin_width=module.min_bin_width,
            min_bin_height=module.min_bin_height,
            min_derivative=module.min_derivative,
            divisor=math.sqrt(hidden),
        )
    )
    return made if module.tails in ("linear", None) else Spline(replace(made.law, ends=True))


def tied(last: Layer, module: Any, spline: Spline, dims: int) -> Layer:
    """Returns the last layer of a network with a row for each parameter of splines.

    Where tails are circular, the last derivative is the first one; where they are linear beside circular ones, both
    are 1. What lies outside of the bound stays, as with linear tails; where tails are in a list, normflows itself makes
    0 of it, which has no inverse.

    Args:
        last: The layer, with the library's rows: the outer derivatives of linear tails stand for nothing.
        module: The transform.
        spline: What `spline_of` returns for it.
        dims: How many dimensions are transformed.
    """
    if not spline.law.ends:
        return last
    K = spline.law.bins
    rows = torch.arange(last.outputs).view(dims, -1)
    rows = torch.cat([rows[:, : 3 * K], rows[:, 2 * K : 2 * K + 1]], 1)
    tails = [module.tails] * dims if isinstance(module.tails, str) else module.tails
    linear = torch.tensor([each == "linear" for each in tails])
    fixed = torch.zeros(rows.shape, dtype=torch.bool)
    fixed[:, [2 * K, 3 * K]] = linear[:, None]
    one = math.log(math.expm1(1 - module.min_derivative))  # of which softplus, and the least derivative, make 1
    rows, fixed = rows.flatten(), fixed.flatten().to(last.weight.device)
    bias = last.weight.new_zeros(last.outputs) if last.bias is None else last.bias
    return replace(
        last,
        weight=last.weight[rows].masked_fill(fixed[:, None], 0.0),
        mask=last.mask[rows] & ~fixed[:, None],
        bias=bias[rows].masked_fill(fixed, one),
    )
