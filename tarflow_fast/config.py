"""The sizes of a TarFlow: ml-tarflow's constructor arguments, checked once."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from .errors import ArgumentError
from .scalars import check_flag, plain

MOST = 2**31 - 1  # of any size


@dataclass(frozen=True)
class TarFlowConfig:
    """Sizes of a TarFlow, under the names of ml-tarflow's constructor.

    in_channels: image channels; img_size: height = width in pixels; patch_size: pixels along a patch's side;
    channels: width C of the transformers; num_blocks: flow blocks K; layers_per_block: transformer layers L;
    nvp: True for affine blocks, False for volume-preserving ones (shift only);
    num_classes: 0 for an unconditional model; head_dim: channels of one attention head.

    Raises ArgumentError for sizes that no model can have.
    """

    in_channels: int
    img_size: int
    patch_size: int
    channels: int
    num_blocks: int
    layers_per_block: int
    nvp: bool = True
    num_classes: int = 0
    head_dim: int = 64

    def __post_init__(self) -> None:
        for field in fields(self):
            value = plain(getattr(self, field.name))
            if field.name == "nvp":
                value = check_flag("nvp", value)
            object.__setattr__(self, field.name, value)
            if field.name == "nvp":
                continue
            low = 0 if field.name == "num_classes" else 1
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= MOST:
                bound = f"an integer >= {low}" + (f" and <= {MOST}" if isinstance(value, int) and value > MOST else "")
                raise ArgumentError(field.name, bound, repr(value))
        if self.img_size % self.patch_size:
            raise ArgumentError("img_size", f"a multiple of patch_size = {self.patch_size}", self.img_size)
        if self.channels % self.head_dim:
            raise ArgumentError("channels", f"a multiple of head_dim = {self.head_dim}", self.channels)

    @property
    def num_patches(self) -> int:
        """T, tokens per image."""
        return (self.img_size // self.patch_size) ** 2

    @property
    def token_dim(self) -> int:
        """D, values per token."""
        return self.in_channels * self.patch_size**2

    @property
    def num_heads(self) -> int:
        return self.channels // self.head_dim

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (self.in_channels, self.img_size, self.img_size)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
