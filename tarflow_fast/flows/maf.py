"""MAF: z_i = (x_i − μ_i(x_<i)) / σ_i(x_<i), whose density is one pass (Papamakarios et al., 2017, arXiv 1705.07057)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import zuko
from torch import nn

from .base import FamilyFlow
from .library import LibraryTransform, check_sizes


class MAF(FamilyFlow):
    """Masked autoregressive flow: a density in one pass, and samples value by value, which `accelerate` makes fast."""

    @dataclass(frozen=True)
    class Options:
        """The options of a masked autoregressive flow.

        Attributes:
            transforms: How many transforms follow one another, each in the opposite order of values.
            hidden: The widths of the hidden layers of each transform's masked network.
        """

        transforms: int = 8
        hidden: tuple[int, ...] = (64, 64)

        def __post_init__(self) -> None:
            check_sizes(self.transforms, self.hidden)

    inverted: ClassVar[bool] = False  # whether data and latents are exchanged

    def __init__(self, data_shape: tuple[int, ...], num_classes: int = 0, options: Options | None = None):
        super().__init__(data_shape, num_classes, options)
        sizes = {"transforms": self.options.transforms, "hidden_features": self.options.hidden}
        flow = zuko.flows.MAF(self.dims, num_classes, activation=nn.ELU, **sizes)
        self.bijection = LibraryTransform(flow.transform.inv if self.inverted else flow.transform)
