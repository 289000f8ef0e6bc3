"""The sizes of a TarFlow: ml-tarflow's constructor arguments, checked once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ..checks import check_choice
from ..engine.shape import BlockShape
from ..errors import ArgumentError
from ..permutation import Permutation
from ..scalars import check_flag, plain
from ..sizes import Size, check_side, checked_size, pair

EXPANSION = 4  # of the MLP's width over the stream's
LAYOUTS = ("image", "tokens")


@dataclass(frozen=True)
class TarFlowConfig:
    """The sizes of a TarFlow, under the names of ml-tarflow's constructor.

    in_channels: image channels. img_size: height and width of an image in pixels, one number where it is a square.
    patch_size: height and width of a patch, one number where it is a square. channels: width C of the transformers.
    num_blocks: flow blocks K. layers_per_block: transformer layers L. nvp: True for affine blocks, False for
    volume-preserving ones, which shift alone. num_classes: 0 for an unconditional model. head_dim: channels of one
    attention head. layout: what the data are, "image", (B, in_channels, H, W), or "tokens", sequences of T tokens of D
    values, (B, T, D), for which in_channels is D, img_size is (T, 1) and patch_size is 1; see `for_tokens`.

    Raises ArgumentError for sizes that no model can have.
    """

    in_channels: int
    img_size: Size
    patch_size: Size
    channels: int
    num_blocks: int
    layers_per_block: int
    nvp: bool = True
    num_classes: int = 0
    head_dim: int = 64
    layout: str = "image"

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = field.name, plain(getattr(self, field.name))
            if name == "nvp":
                value = check_flag("nvp", value)
            elif name == "layout":
                check_choice("layout", value, LAYOUTS)
            elif name in ("img_size", "patch_size"):
                value = checked_size(name, value)
            else:
                check_side(name, value, 0 if name == "num_classes" else 1)
            object.__setattr__(self, name, value)
        for side, patch in zip(self.image_size, self.patch_shape, strict=True):
            if side % patch:
                raise ArgumentError("img_size", f"a multiple of patch_size = {self.patch_size}", self.img_size)
        if self.channels % self.head_dim:
            raise ArgumentError("channels", f"a multiple of head_dim = {self.head_dim}", self.channels)
        if self.layout == "tokens" and (self.patch_size != 1 or self.image_size[1] != 1):
            got = f"img_size = {self.img_size}, patch_size = {self.patch_size}"
            raise ArgumentError("layout", "'image' unless img_size is (T, 1) and patch_size 1", got)

    @classmethod
    def for_tokens(
        cls,
        tokens: int,
        token_dim: int,
        channels: int,
        num_blocks: int,
        layers_per_block: int,
        nvp: bool = True,
        num_classes: int = 0,
        head_dim: int = 64,
    ) -> TarFlowConfig:
        """The sizes of a model of sequences, (B, tokens, token_dim)."""
        check_side("tokens", tokens, 1)
        check_side("token_dim", token_dim, 1)
        sizes = (channels, num_blocks, layers_per_block, nvp, num_classes, head_dim)
        return cls(token_dim, (tokens, 1), 1, *sizes, layout="tokens")

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        return pair(self.img_size)

    @property
    def patch_shape(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        return pair(self.patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches in an image."""
        (height, width), (rows, columns) = self.image_size, self.patch_shape
        return height // rows, width // columns

    @property
    def num_patches(self) -> int:
        """T, tokens of an image."""
        rows, columns = self.grid
        return rows * columns

    @property
    def token_dim(self) -> int:
        """D, values of a token."""
        rows, columns = self.patch_shape
        return self.in_channels * rows * columns

    @property
    def block_shape(self) -> BlockShape:
        """The sizes of each flow block."""
        return BlockShape(
            tokens=self.num_patches,
            token_dim=self.token_dim,
            channels=self.channels,
            layers=self.layers_per_block,
            heads=self.channels // self.head_dim,
            head_dim=self.head_dim,
            hidden=EXPANSION * self.channels,
            classes=self.num_classes,
            transform="affine" if self.nvp else "shift",
        )

    def permutation(self, k: int) -> Permutation:
        """The order in which block k reads the tokens: every other one from the last to the first."""
        return Permutation.reverse(self.num_patches) if k % 2 else Permutation.identity(self.num_patches)

    @property
    def data_shape(self) -> tuple[int, ...]:
        """The shape of one of the data: (in_channels, H, W), or (T, D) of a sequence."""
        if self.layout == "tokens":
            return (self.num_patches, self.token_dim)
        return (self.in_channels, *self.image_size)

    def to_dict(self) -> dict[str, Any]:
        """The sizes by name, as a checkpoint records them; the layout only where it is not that of images."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.layout == "image":
            del values["layout"]
        return values
