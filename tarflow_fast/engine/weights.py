"""A flow block's weights as engines take them: plain tensors in the block's own token order."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor

from ..errors import ArgumentError
from .shape import BlockShape


@dataclass(frozen=True)
class LayerWeights:
    """The weights of one transformer layer. Weights of linear layers are (out, in), as in torch."""

    norm1_weight: Tensor  # (C,)
    norm1_bias: Tensor
    qkv_weight: Tensor  # (3C, C), rows ordered (q|k|v, head, channel)
    qkv_bias: Tensor
    proj_weight: Tensor  # (C, C)
    proj_bias: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor
    fc1_weight: Tensor  # (F, C), F = shape.hidden
    fc1_bias: Tensor
    fc2_weight: Tensor  # (C, F)
    fc2_bias: Tensor


@dataclass(frozen=True)
class BlockWeights:
    """The sizes and weights of a flow block. The tensors may have any float dtype and be on any one device.

    Raises ArgumentError for tensors that do not have the shapes of such a block.
    """

    shape: BlockShape
    proj_in_weight: Tensor  # (C, D)
    proj_in_bias: Tensor
    position: Tensor  # (T, C), in the block's token order
    classes: Tensor | None  # (classes + 1, C); the last row is for "no class"
    layers: tuple[LayerWeights, ...]
    proj_out_weight: Tensor  # (2D, C), or (D, C) for volume-preserving blocks
    proj_out_bias: Tensor

    def __post_init__(self) -> None:
        s = self.shape
        C, D = s.channels, s.token_dim
        shapes: dict[str, tuple[int, ...]] = {
            "proj_in_weight": (C, D),
            "proj_in_bias": (C,),
            "position": (s.tokens, C),
            **({"classes": (s.classes + 1, C)} if s.classes else {}),
            "proj_out_weight": (s.parameters, C),
            "proj_out_bias": (s.parameters,),
        }
        for name, shape in shapes.items():
            _check_shape(name, getattr(self, name), shape)
        if self.classes is not None and not s.classes:
            raise ArgumentError("classes", "None, as the block has no classes", tuple(self.classes.shape))
        if len(self.layers) != s.layers:
            raise ArgumentError("layers", f"{s.layers}, as the block's sizes say", len(self.layers))
        for i, layer in enumerate(self.layers):
            for part in fields(layer):
                _check_shape(f"layers[{i}].{part.name}", getattr(layer, part.name), _layer_shape(part.name, s))


def _layer_shape(name: str, s: BlockShape) -> tuple[int, ...]:
    """Returns the shape of that tensor of a layer."""
    C, F = s.channels, s.hidden
    part, kind = name.split("_")
    weight = {"qkv": (3 * C, C), "proj": (C, C), "fc1": (F, C), "fc2": (C, F)}.get(part, (C,))
    return weight if kind == "weight" else weight[:1]


def _check_shape(name: str, value: object, shape: tuple[int, ...]) -> None:
    """Raises ArgumentError for what is no tensor of this shape."""
    found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    if found != shape:
        raise ArgumentError(name, f"a tensor of shape {shape}", found)
