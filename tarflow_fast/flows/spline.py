"""Neural spline flows: z_i = RQS(x_i; φ_i), a monotone rational-quadratic spline (Durkan et al., arXiv 1906.04032).

The parameters φ_i of a value come from the values before it (autoregressive), or from the other half (coupling). A
spline is the identity outside of [−5, 5], so data are best standardised.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import zuko
from torch import nn

from ..checks import check_count
from .library import LibraryFlow, check_sizes


class SplineAutoregressive(LibraryFlow):
    """Autoregressive neural spline flow: the most flexible; a density in one pass, samples value by value."""

    @dataclass(frozen=True)
    class Options:
        """The options of a neural spline flow.

        transforms: How many transforms follow one another. hidden: The widths of the hidden layers of the network of
        each. bins: K, the number of bins of a spline, which has 3K − 1 parameters.
        """

        transforms: int = 4
        hidden: tuple[int, ...] = (64, 64)
        bins: int = 8

        def __post_init__(self) -> None:
            check_sizes(self.transforms, self.hidden)
            check_count("bins", self.bins, low=2)

    options: Any

    def make(self, dims: int, classes: int) -> nn.Module:
        made: nn.Module = zuko.flows.NSF(dims, classes, bins=self.options.bins, **self._sizes()).transform
        return made

    def _sizes(self) -> dict[str, Any]:
        return {"transforms": self.options.transforms, "hidden_features": self.options.hidden}


class SplineCoupling(SplineAutoregressive):
    """Coupling neural spline flow: half of the values is transformed by the other half, and both directions are quick."""

    def make(self, dims: int, classes: int) -> nn.Module:
        K = self.options.bins
        spline = partial(zuko.transforms.MonotonicRQSTransform, slope=1e-3)
        how = {"univariate": spline, "shapes": [(K,), (K,), (K - 1,)], **self._sizes()}
        made: nn.Module = zuko.flows.NICE(dims, classes, **how).transform
        return made
