"""The noise that latents are, which depends on the seed and the image number alone, and that of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

# numpy imports this at its first use otherwise, and an interrupt meanwhile is lost in its compiled modules
from numpy.random import Generator, Philox, SeedSequence
from torch import Tensor

from ..checks import Number, check_number
from ..errors import ArgumentError

LABELS = 2**32 - 1  # in the place of an attempt


def latent_noise(seed: int, images: Sequence[int], tokens: int, token_dim: int, attempt: int = 0) -> Tensor:
    """z ~ N(0, 1) for the given image numbers, (n, T, D) fp32 on the CPU.

    Each image has its own counter-based stream (Philox, keyed through numpy's SeedSequence by seed, image number and
    attempt), so it is the same in every batch, on every device and in every order.
    """
    out = np.empty((len(images), tokens, token_dim), dtype=np.float32)
    for row, image in zip(out, images, strict=True):
        stream = SeedSequence(entropy=seed, spawn_key=(image, attempt))
        Generator(Philox(stream)).standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(out)


def random_label(seed: int, image: int, classes: int) -> int:
    """A class for that image number, each as likely, from a stream that no noise comes from."""
    stream = SeedSequence(entropy=seed, spawn_key=(image, LABELS))
    return int(Generator(Philox(stream)).integers(classes))


def resolve_noise_std(metadata: Mapping[str, Any], noise_std: Number | None) -> float:
    """σ as given, or as the model records it. Raises ArgumentError when neither is known."""
    if noise_std is None:
        recorded = metadata.get("noise_std")
        if not recorded:
            raise ArgumentError("noise_std", "the σ of the training noise, which this checkpoint does not record", None)
        noise_std = recorded
    return check_number("noise_std", noise_std, 0, open_low=True)
