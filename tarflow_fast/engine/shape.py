"""The sizes of one flow block: all that an engine knows of the model that the block is part of."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..checks import check_choice
from ..errors import ArgumentError

TRANSFORMS = ("affine", "shift")


@dataclass(frozen=True)
class BlockShape:
    """The sizes of a flow block: a causal transformer over T tokens of D values, and the transform that it conditions.

    tokens: T. token_dim: D. channels: width C of the residual stream. layers: L. heads, head_dim: H and d, H · d = C.
    hidden: width of the MLP between its two products, in TarFlow 4 C. classes: of a conditional block, else 0.
    transform: what the parameters do to a token: "affine", x = z · exp(xa) + xb, or "shift", x = z + xb.

    Raises ArgumentError for sizes that no block can have.
    """

    tokens: int
    token_dim: int
    channels: int
    layers: int
    heads: int
    head_dim: int
    hidden: int
    classes: int = 0
    transform: str = "affine"

    def __post_init__(self) -> None:
        check_choice("transform", self.transform, TRANSFORMS)
        for field in fields(self):
            value, low = getattr(self, field.name), 0 if field.name == "classes" else 1
            if field.name != "transform" and (type(value) is not int or value < low):
                raise ArgumentError(field.name, f"an integer >= {low}", repr(value))
        if self.heads * self.head_dim != self.channels:
            raise ArgumentError("channels", f"heads · head_dim = {self.heads * self.head_dim}", self.channels)

    @property
    def affine(self) -> bool:
        """Whether tokens are scaled, and not shifted alone."""
        return self.transform == "affine"

    @property
    def parameters(self) -> int:
        """The number of parameters that transform one token: 2 D, or D where it is shifted alone."""
        return 2 * self.token_dim if self.affine else self.token_dim

    @property
    def native(self) -> dict[str, int]:
        """The sizes as native code takes them, see `Sizes` in csrc/cpu/kernels.h."""
        names = ("tokens", "token_dim", "channels", "layers", "head_dim", "hidden")
        return {**{name: getattr(self, name) for name in names}, "affine": int(self.affine)}
