"""The sizes of a model are read off the shapes of its weights, as far as these tell; what they leave open is given."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import ArgumentError, CheckpointError, some
from ..models.config import TarFlowConfig
from ..sizes import Size, pair
from .stored import StoredTensor

HEAD_DIM = 64  # a model that does not record its head size has this one

Weights = Mapping[str, Tensor | StoredTensor]


def infer_config(
    state: Weights,
    *,
    patch_size: Size | None = None,
    in_channels: int | None = None,
    head_dim: int | None = None,
    img_size: Size | None = None,
    layout: str = "image",
) -> TarFlowConfig:
    """Returns the sizes of an ml-tarflow state dict, by the rule in `load`.

    state: the tensors by name, without a prefix. The other arguments are sizes that are known, under the names of
    `TarFlowConfig`. Raises CheckpointError for weights that are not a TarFlow's, and ArgumentError for sizes that do
    not fit them.
    """
    blocks = _count(state, re.compile(r"blocks\.([0-9]+)\."), "blocks")
    layers = _count(state, re.compile(r"blocks\.0\.attn_blocks\.([0-9]+)\."), "blocks.0.attn_blocks")
    needed = ("blocks.0.proj_in.weight", "blocks.0.proj_out.weight", "blocks.0.pos_embed")
    missing = [key for key in needed if key not in state]
    if missing or not layers:
        raise CheckpointError(f"not a TarFlow: no {some(missing or ['blocks.0.attn_blocks.0'])}")
    for key in needed:
        if len(state[key].shape) != 2:
            raise CheckpointError(f"{key}: expected two dimensions, got shape {tuple(state[key].shape)}")
    (C, D), outputs, T = state[needed[0]].shape, state[needed[1]].shape[0], state[needed[2]].shape[0]
    if outputs not in (D, 2 * D) or not D:
        raise CheckpointError(f"blocks.0.proj_out.weight: expected {D} or {2 * D} rows, got {outputs}")
    if T == 0:
        raise CheckpointError("blocks.0.pos_embed: expected at least one token, got none")
    classes = state.get("blocks.0.class_embed")
    if classes is not None and (len(classes.shape) != 3 or not classes.shape[0]):
        raise CheckpointError(f"blocks.0.class_embed: expected (classes, 1, {C}), got shape {tuple(classes.shape)}")
    token = _split_token(D, in_channels, patch_size)
    left_open = {
        "patch_size": token is None and f"a token has {D} values, neither 3 nor 1 channels of a square patch",
        "img_size": img_size is None and math.isqrt(T) ** 2 != T and f"{T} tokens make no square",
        "head_dim": head_dim is None and C % HEAD_DIM != 0 and f"its width {C} is no multiple of {HEAD_DIM}",
    }
    asked = {name: why for name, why in left_open.items() if why}
    if asked or token is None:
        raise CheckpointError(f"its weights leave sizes open: {'; '.join(asked.values())}; give {_listed([*asked])}")
    in_channels, patch_size = token
    return TarFlowConfig(
        in_channels=in_channels,
        img_size=_image_size(T, patch_size, img_size),
        patch_size=patch_size,
        channels=C,
        num_blocks=blocks,
        layers_per_block=layers,
        nvp=outputs == 2 * D,
        num_classes=0 if classes is None else classes.shape[0],
        head_dim=HEAD_DIM if head_dim is None else head_dim,
        layout=layout,
    )


def _image_size(T: int, patch_size: Size, img_size: Size | None) -> Size:
    """Returns height and width of an image of T patches: those given, if they fit, else those of a square."""
    rows, columns = pair(patch_size)
    if img_size is not None:
        height, width = pair(img_size)
        if height % rows or width % columns or height // rows * (width // columns) != T:
            raise ArgumentError("img_size", f"a size of {T} patches of {rows}×{columns}", img_size)
        return img_size
    side = math.isqrt(T)
    return side * rows, side * columns


def _split_token(D: int, in_channels: int | None, patch_size: Size | None) -> tuple[int, Size] | None:
    """Returns (in_channels, patch_size) of a token of D values, or None where these are open.

    Raises ArgumentError for given ones that no token of D values has.
    """
    if patch_size is not None:
        pixels = math.prod(pair(patch_size))
        if D % pixels:
            area = "square" if isinstance(patch_size, int) else "product"
            raise ArgumentError("patch_size", f"a patch size whose {area} divides the token size {D}", patch_size)
        if in_channels not in (None, D // pixels):
            raise ArgumentError("in_channels", f"{D // pixels} with patch_size {patch_size}", in_channels)
        return D // pixels, patch_size
    for channels in (3, 1) if in_channels is None else (in_channels,):
        if channels > 0 and D % channels == 0 and math.isqrt(D // channels) ** 2 == D // channels:
            return channels, math.isqrt(D // channels)
    if in_channels is not None:
        raise ArgumentError("in_channels", f"a number that leaves a square patch of the token size {D}", in_channels)
    return None


def _listed(names: list[str]) -> str:
    """Returns the names as text: "a", "a and b", or "a, b and c"."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _count(state: Weights, pattern: re.Pattern[str], what: str) -> int:
    """Returns how many there are, numbered from 0 without a gap. Raises CheckpointError where there is a gap."""
    numbers = {match[1] for key in state if (match := pattern.match(key))}
    missing = next((n for n in range(len(numbers)) if str(n) not in numbers), None)
    if missing is not None:
        raise CheckpointError(f"not a TarFlow: {what} are numbered with gaps, there is no {what}.{missing}")
    return len(numbers)


def fitting_patch(state: Weights, hints: Mapping[str, Any]) -> int | None:
    """Returns the patch size of the settings beside the weights if the weights can have it, else None."""
    D, patch, channels = _token_size(state), hints.get("patch_size"), hints.get("in_channels")
    if patch is None and channels is not None and D % channels == 0:
        patch = math.isqrt(D // channels)
    if patch is None or not D or D % patch**2 or channels not in (None, D // patch**2):
        return None
    return int(patch)


def open_sizes(state: Weights) -> list[str]:
    """Returns a note where the weights of a grey model are as well those of one of four channels, as latents have."""
    D = _token_size(state)
    side = math.isqrt(D)
    if side * side != D or side % 2:
        return []
    return [
        f"its weights leave open how many channels an image has; taken as 1, patches of {side}×{side} "
        f"(not 4, of {side // 2}×{side // 2}); patch_size or in_channels tells"
    ]


def _token_size(state: Weights) -> int:
    """Returns D, the number of values of a token, or 0 where the weights do not tell."""
    weight = state.get("blocks.0.proj_in.weight")
    return 0 if weight is None or len(weight.shape) != 2 else int(weight.shape[1])
