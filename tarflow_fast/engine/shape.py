"""The sizes of one flow block, which are all that an engine knows of the model."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..checks import check_choice
from ..errors import ArgumentError

TRANSFORMS = ("affine", "shift")


@dataclass(frozen=True)
class BlockShape:
    """The sizes of a flow block: a causal transformer over T tokens of D values, and the transform that it conditions.

    Attributes:
        tokens: T, the number of tokens.
        token_dim: D, the number of values of a token.
        channels: C, the width of the residual stream.
        layers: L, the number of transformer layers.
        heads: H, the number of attention heads.
        head_dim: d, the width of a head, where H · d = C.
        hidden: F, the width of the MLP between its two products; in TarFlow 4 C.
        classes: The number of classes of a conditional block, else 0.
        transform: How the parameters transform a token: "affine" is x = z · exp(xa) + xb, "shift" is x = z + xb.

    Raises:
        ArgumentError: No block can have these sizes.
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
        """Returns whether tokens are scaled as well as shifted."""
        return self.transform == "affine"

    @property
    def parameters(self) -> int:
        """Returns the number of parameters that transform one token: 2 D, or D where tokens are only shifted."""
        return 2 * self.token_dim if self.affine else self.token_dim

    @property
    def native(self) -> dict[str, int]:
        """Returns the sizes by the names of native code, see `Sizes` in csrc/cpu/kernels.h."""
        names = ("tokens", "token_dim", "channels", "layers", "head_dim", "hidden")
        return {**{name: getattr(self, name) for name in names}, "affine": int(self.affine)}
