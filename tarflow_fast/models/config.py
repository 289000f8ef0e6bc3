"""The sizes of a TarFlow are the arguments of ml-tarflow's constructor, and are checked once, here."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ..checks import check_choice, check_count
from ..engine.shape import BlockShape
from ..errors import ArgumentError
from ..permutation import Permutation
from ..scalars import check_flag, plain
from ..sizes import Size, check_side, checked_size, pair

EXPANSION = 4  # the MLP is so many times as wide as the residual stream
LAYOUTS = ("image", "tokens")


@dataclass(frozen=True)
class TarFlowConfig:
    """A `TarFlowConfig` holds the sizes of a TarFlow, under the names of ml-tarflow's constructor.

    Attributes:
        in_channels: The number of channels of an image.
        img_size: The height and width of an image in pixels, as one number where it is a square.
        patch_size: The height and width of a patch in pixels, as one number where it is a square; each divides the
            image's.
        channels: The width C of the transformers, a multiple of `head_dim`.
        num_blocks: The number K of flow blocks.
        layers_per_block: The number L of transformer layers in a block.
        nvp: True for affine blocks, False for volume-preserving ones, which shift alone.
        num_classes: The number of classes, 0 for an unconditional model.
        head_dim: The number of channels of one attention head.
        layout: The kind of the data. "image" stands for images (B, in_channels, H, W); "tokens" for sequences of T
            tokens of D values, (B, T, D), for which in_channels is D, img_size is (T, 1) and patch_size is 1 (see
            `for_tokens`).

    Raises:
        ArgumentError: The sizes are such as no model can have.
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
        """Returns the sizes of a model of sequences, (B, tokens, token_dim).

        Args:
            tokens: The number T of tokens of a sequence.
            token_dim: The number D of values of a token.
            channels: See the class.
            num_blocks: See the class.
            layers_per_block: See the class.
            nvp: See the class.
            num_classes: See the class.
            head_dim: See the class.

        Raises:
            ArgumentError: The sizes are such as no model can have.
        """
        check_side("tokens", tokens, 1)
        check_side("token_dim", token_dim, 1)
        sizes = (channels, num_blocks, layers_per_block, nvp, num_classes, head_dim)
        return cls(token_dim, (tokens, 1), 1, *sizes, layout="tokens")

    @property
    def image_size(self) -> tuple[int, int]:
        """Returns the height and width of an image in pixels."""
        return pair(self.img_size)

    @property
    def patch_shape(self) -> tuple[int, int]:
        """Returns the height and width of a patch in pixels."""
        return pair(self.patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Returns how many rows and columns of patches an image has."""
        (height, width), (rows, columns) = self.image_size, self.patch_shape
        return height // rows, width // columns

    @property
    def num_patches(self) -> int:
        """Returns T, the number of tokens of an image or a sequence."""
        rows, columns = self.grid
        return rows * columns

    @property
    def token_dim(self) -> int:
        """Returns D, the number of values of a token."""
        rows, columns = self.patch_shape
        return self.in_channels * rows * columns

    @property
    def block_shape(self) -> BlockShape:
        """Returns the sizes of a flow block, which are the same for all blocks of the model."""
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
        """Returns the order in which block k reads the tokens: backwards where k is odd.

        Raises ArgumentError where there is no such block.
        """
        k = check_count("k", k, 0, self.num_blocks - 1)
        return Permutation.reverse(self.num_patches) if k % 2 else Permutation.identity(self.num_patches)

    @property
    def kind(self) -> str:
        """Returns what messages call the data: "images" or "sequences"."""
        return "sequences" if self.layout == "tokens" else "images"

    @property
    def data_shape(self) -> tuple[int, ...]:
        """Returns the shape of one of the data: (in_channels, H, W) of an image, (T, D) of a sequence."""
        if self.layout == "tokens":
            return (self.num_patches, self.token_dim)
        return (self.in_channels, *self.image_size)

    def to_dict(self) -> dict[str, Any]:
        """Returns the sizes by name, as a checkpoint records them; it has no layout where that is "image"."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.layout == "image":
            del values["layout"]
        return values
