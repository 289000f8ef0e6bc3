"""IAF: x_i = μ_i(z_<i) + σ_i(z_<i) · z_i, whose samples are one pass (Kingma et al., 2016, arXiv 1606.04934)."""

from __future__ import annotations

from dataclasses import dataclass

import zuko
from torch import nn

from .base import FamilyFlow
from .library import LibraryTransform, check_sizes


class IAF(FamilyFlow):
    """Inverse autoregressive flow: samples in one pass, and a density value by value, which `accelerate` makes fast.

    It is MAF with data and latents exchanged. Training by maximum likelihood asks for the density of data, the slow
    direction, by zuko's own D passes, so that this family is for few dimensions.
    """

    @dataclass(frozen=True)
    class Options:
        """The options of an inverse autoregressive flow.

        Attributes:
            transforms: How many transforms follow one another, each in the opposite order of values.
            hidden: The widths of the hidden layers of each transform's masked network.
        """

        transforms: int = 6
        hidden: tuple[int, ...] = (64, 64)

        def __post_init__(self) -> None:
            check_sizes(self.transforms, self.hidden)

    def __init__(self, data_shape: tuple[int, ...], num_classes: int = 0, options: Options | None = None):
        super().__init__(data_shape, num_classes, options)
        sizes = {"transforms": self.options.transforms, "hidden_features": self.options.hidden}
        flow = zuko.flows.MAF(self.dims, num_classes, activation=nn.ELU, **sizes)
        self.bijection = LibraryTransform(flow.transform.inv)
