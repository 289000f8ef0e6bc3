"""MAF: z_i = (x_i − μ_i(x_<i)) / σ_i(x_<i), whose density is one pass (Papamakarios et al., arXiv 1705.07057)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import zuko
from torch import nn

from .library import LibraryFlow, check_sizes


class MAF(LibraryFlow):
    """Masked autoregressive flow: a density in one pass, and samples value by value, which `accelerate` makes fast."""

    @dataclass(frozen=True)
    class Options:
        """The options of a masked autoregressive flow.

        transforms: How many transforms follow one another, each in the opposite order of values. hidden: The widths of
        the hidden layers of the masked network of each.
        """

        transforms: int = 8
        hidden: tuple[int, ...] = (64, 64)

        def __post_init__(self) -> None:
            check_sizes(self.transforms, self.hidden)

    options: Any

    def make(self, dims: int, classes: int) -> nn.Module:
        sizes = {"transforms": self.options.transforms, "hidden_features": self.options.hidden}
        made: nn.Module = zuko.flows.MAF(dims, classes, activation=nn.ELU, **sizes).transform
        return made
