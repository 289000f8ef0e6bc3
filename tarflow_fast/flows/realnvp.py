"""RealNVP: affine couplings, for images in several scales (Dinh et al., 2017, arXiv 1605.08803)."""

from __future__ import annotations

from dataclasses import dataclass

from ..checks import check_count
from ..scalars import check_flag
from .actnorm import ActNorm
from .base import Bijection, FamilyFlow
from .composition import Chain, Multiscale, Squeeze, scale_shapes
from .coupling import Coupling, alternating, checkerboard, half_of_channels
from .networks import Convolutions, Perceptron

MOST_WITH_OCTAVES = 3  # values of a vector
OCTAVES = 4


class RealNVP(FamilyFlow):
    """z = f_n(… f_1(x)), each f scaling and shifting every other value by functions of the rest.

    Vectors have alternating masks. An image goes through scales: couplings with checkerboard masks, a squeeze,
    couplings with channel masks, after which half of the channels leave; the last scale has checkerboard masks alone.
    """

    @dataclass(frozen=True)
    class Options:
        """The options of RealNVP.

        Attributes:
            couplings: For vectors, the number of couplings.
            hidden: For vectors, the widths of the hidden layers of each coupling's network.
            octaves: For vectors of at most three values, how many octaves of sines and cosines of the values each
                network sees beside them, by which it learns sharp edges; 4 if None. With more values it would learn
                samples by heart, so that it sees none.
            scales: For images, the number of scales.
            per_scale: For images, the number of couplings with one kind of mask in each scale.
            width: For images, the channels of each coupling's network.
            blocks: For images, the residual blocks of each coupling's network.
            actnorm: Whether an ActNorm goes before each coupling, as batch normalisation does in the paper.
        """

        couplings: int = 8
        hidden: tuple[int, ...] = (64, 64)
        octaves: int | None = None
        scales: int = 3
        per_scale: int = 2
        width: int = 32
        blocks: int = 1
        actnorm: bool = True

        def __post_init__(self) -> None:
            for name in ("couplings", "scales", "per_scale", "width"):
                check_count(name, getattr(self, name))
            check_count("blocks", self.blocks, low=0)
            check_count("octaves", OCTAVES if self.octaves is None else self.octaves, low=0, high=16)
            check_flag("actnorm", self.actnorm)

    for_vectors = ("couplings", "hidden")
    for_images = ("scales", "per_scale", "width", "blocks")

    @classmethod
    def idle_options(cls, data_shape: tuple[int, ...], options: Options) -> dict[str, str]:
        """Returns what `FamilyFlow.idle_options` does; octaves are for few values alone."""
        idle = super().idle_options(data_shape, options)
        few = len(data_shape) == 1 and data_shape[0] <= MOST_WITH_OCTAVES
        return idle if few else {**idle, "octaves": f"vectors of at most {MOST_WITH_OCTAVES} values"}

    def __init__(self, data_shape: tuple[int, ...], num_classes: int = 0, options: Options | None = None):
        super().__init__(data_shape, num_classes, options)
        if len(self.data_shape) == 3:
            channels, height, width = self.data_shape
            self.bijection = self._scales((channels, height, width))
        else:
            self.bijection = Chain(self._vector_steps())

    def _vector_steps(self) -> list[Bijection]:
        steps: list[Bijection] = []
        o = self.options
        octaves = 0 if self.dims > MOST_WITH_OCTAVES else OCTAVES if o.octaves is None else o.octaves
        for k in range(o.couplings):
            network = Perceptron(self.data_shape, 2, o.hidden, self.num_classes, octaves=octaves)
            steps += [*self._norm(self.data_shape), Coupling(alternating(self.data_shape, odd=k % 2 == 1), network)]
        return steps

    def _scales(self, shape: tuple[int, int, int]) -> Bijection:
        *early, last = scale_shapes(shape, self.options.scales)
        scales = []
        for channels, height, width in early:
            squeezed = (4 * channels, height // 2, width // 2)
            first = self._image_steps((channels, height, width), checkers=True)
            scales.append(Chain([*first, Squeeze(), *self._image_steps(squeezed, checkers=False)]))
        return Multiscale(shape, [*scales, Chain(self._image_steps(last, checkers=True))])

    def _image_steps(self, shape: tuple[int, int, int], *, checkers: bool) -> list[Bijection]:
        mask = checkerboard if checkers else half_of_channels
        steps: list[Bijection] = []
        for k in range(self.options.per_scale):
            network = Convolutions(shape[0], 2, self.options.width, self.options.blocks, self.num_classes)
            steps += [*self._norm(shape), Coupling(mask(shape, odd=k % 2 == 1), network)]
        return steps

    def _norm(self, shape: tuple[int, ...]) -> list[Bijection]:
        return [ActNorm(shape)] if self.options.actnorm else []
