"""Latent noise that depends on the seed and the image number alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

# numpy imports this at its first use otherwise, and an interrupt meanwhile is lost in its compiled modules
from numpy.random import Generator, Philox, SeedSequence
from torch import Tensor

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
