"""NICE: additive couplings, and one learnt scale for each value at the top (Dinh et al., 2014, arXiv 1410.8516)."""

from __future__ import annotations

from dataclasses import dataclass

from ..checks import check_count
from .base import FamilyFlow
from .composition import Chain
from .coupling import Coupling, DiagonalScale, alternating
from .networks import Perceptron


class NICE(FamilyFlow):
    """z = exp(s) · h_n(… h_1(x)): each h shifts every other value by a function of the rest, so that log-det = Σ s."""

    @dataclass(frozen=True)
    class Options:
        """The options of NICE.

        Attributes:
            couplings: The number of additive couplings, of which at least three are needed to change all values.
            hidden: The widths of the hidden layers of each coupling's network.
        """

        couplings: int = 8
        hidden: tuple[int, ...] = (128, 128)

        def __post_init__(self) -> None:
            check_count("couplings", self.couplings)

    def __init__(self, data_shape: tuple[int, ...], num_classes: int = 0, options: Options | None = None):
        super().__init__(data_shape, num_classes, options)
        shape, hidden = self.data_shape, self.options.hidden
        couplings = []
        for k in range(self.options.couplings):
            # The identity is a saddle for data that are symmetric: shifts that begin at zero would stay there.
            network = Perceptron(shape, 1, hidden, num_classes, zeroed=False)
            couplings.append(Coupling(alternating(shape, odd=k % 2 == 1), network))
        self.bijection = Chain([*couplings, DiagonalScale(shape)])
