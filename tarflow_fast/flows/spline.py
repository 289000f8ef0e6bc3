"""Neural spline flows: z_i = RQS(x_i; φ_i), a rational-quadratic spline (Durkan et al., 2019, arXiv 1906.04032).

The parameters φ_i of a value come from the values before it (autoregressive), or from the other half (coupling). A
spline is the identity outside of [−5, 5], so data are best standardised.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import zuko

from ..adapters.zuko_spline import FusedRQSTransform
from ..checks import check_count
from .base import FamilyFlow
from .library import LibraryTransform, check_sizes


class SplineAutoregressive(FamilyFlow):
    """Autoregressive neural spline flow: the most flexible; a density in one pass, and samples value by value."""

    @dataclass(frozen=True)
    class Options:
        """The options of a neural spline flow.

        Attributes:
            transforms: How many transforms follow one another.
            hidden: The widths of the hidden layers of each transform's network.
            bins: K, the number of bins of a spline, which has 3K − 1 parameters.
        """

        transforms: int = 4
        hidden: tuple[int, ...] = (64, 64)
        bins: int = 8

        def __post_init__(self) -> None:
            check_sizes(self.transforms, self.hidden)
            check_count("bins", self.bins, low=2)

    kind: ClassVar[Any] = zuko.flows.MAF

    def __init__(self, data_shape: tuple[int, ...], num_classes: int = 0, options: Options | None = None):
        super().__init__(data_shape, num_classes, options)
        K = self.options.bins
        how = {"transforms": self.options.transforms, "hidden_features": self.options.hidden}
        spline = {
            "univariate": partial(FusedRQSTransform, slope=1e-3),
            "shapes": [(K,), (K,), (K - 1,)],
        }
        self.bijection = LibraryTransform(self.kind(self.dims, num_classes, **spline, **how).transform)


class SplineCoupling(SplineAutoregressive):
    """Coupling neural spline flow: every other value is transformed by the rest, so that both directions are quick."""

    kind = zuko.flows.NICE
