"""This module says where the 8-bit values of pictures lie on the scale −1 to 1 of a model."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ..checks import check_dense, kind_of, short
from ..errors import ArgumentError

Array = TypeVar("Array", Tensor, np.ndarray)


def scaled(v: Array) -> Array:
    """Returns x = v/127.5 − 1 of 8-bit values v, which are given as fp32."""
    return v / 127.5 - 1


def dequantized(v: Array, u: Array) -> Array:
    """Returns x = (v + u)/128 − 1 of 8-bit values v and noise u in [0, 1), fp32 of one shape."""
    return (v + u) / 128 - 1


def dequantize(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """x = (v + u)/128 − 1, u uniform in [0, 1): 8-bit images become fp32 in [-1, 1).

    u has 16 bits, so that v + u is exact in fp32 and ⌊128 (x + 1)⌋ gives v back.

    Args:
        images: A uint8 tensor of any shape, v.
        generator: A torch.Generator for u on the device of `images`; by default torch's own.

    Returns:
        x, fp32 of the same shape, on the same device.

    Raises:
        ArgumentError: `images` is no dense uint8 tensor, or `generator` is no torch.Generator.
    """
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        got = short(images.dtype) if isinstance(images, Tensor) else kind_of(images)
        raise ArgumentError("images", "a uint8 tensor", got)
    check_dense("images", images)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ArgumentError("generator", "a torch.Generator", kind_of(generator))
    u = torch.randint(2**16, images.shape, generator=generator, device=images.device)
    return dequantized(images, u.to(torch.float32) / 2**16)
