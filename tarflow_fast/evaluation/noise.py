"""A `Noise` is added to 8-bit images before their density is taken."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..checks import check_choice, check_count, check_number, kind_of
from ..errors import ArgumentError
from ..models.density import TarFlowDensity, check_model
from ..models.pixels import dequantized, scaled
from ..scalars import plain

NOISES = ("uniform", "gaussian", "none")


@dataclass(frozen=True)
class Noise:
    """A `Noise` is what is added to an 8-bit image v before its density is taken.

    Data that are no pictures are on the scale of x already: x = v + σε, or v with "none".

    Attributes:
        kind: "uniform", x = (v + u)/128 − 1 with u uniform in [0, 1); "gaussian", x = v/127.5 − 1 + σε; or "none", x =
            v/127.5 − 1.
        std: σ > 0, on the scale of x; 0 unless the kind is "gaussian".
        seed: The seed of the noise; that of image i depends on (seed, i, draw) alone.

    Raises:
        ArgumentError: A field has the wrong type or range, or `std` does not go with the kind.
    """

    kind: str = "uniform"
    std: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("noise", self.kind, NOISES)
        object.__setattr__(self, "seed", check_count("seed", self.seed, low=0))
        object.__setattr__(self, "std", plain(self.std))
        if self.kind == "gaussian":
            check_number("noise_std", self.std, 0, open_low=True)
        elif self.std != 0:
            raise ArgumentError("noise_std", f"no level with {self.kind!r} noise", repr(self.std))

    @classmethod
    def of(cls, model: TarFlowDensity, kind: str = "auto", std: float | None = None, seed: int = 0) -> Noise:
        """Returns noise of a kind and level; what is left out ("auto", None) is what the model was trained with.

        Where a model's metadata tells nothing, one of pictures is taken to be trained with uniform noise, and one of
        data that are no pictures, as sequences, with none. Raises ArgumentError
        for another model, and for Gaussian noise whose level is neither given nor in the metadata.
        """
        known = check_model(model, values=False).metadata
        if kind == "auto":
            kind = "gaussian" if std is not None or "noise_std" in known else "none" if model.raw else "uniform"
            kind = kind if std is not None else known.get("noise_type", kind)
        if kind == "gaussian" and std is None:
            if "noise_std" not in known:
                raise ArgumentError("noise_std", "a level, as the model's metadata names none", "None")
            std = known["noise_std"]
        return cls(kind, 0.0 if std is None else std, seed)

    def __str__(self) -> str:
        if self.kind == "gaussian":
            return f"Gaussian noise, σ = {self.std:g}"
        return "uniform dequantisation" if self.kind == "uniform" else "no noise"

    def add(self, images: Tensor, first: int = 0, draw: int = 0) -> Tensor:
        """Returns x, fp32 on the CPU, of images that are numbered from `first` on.

        images: (n, ch, H, W) uint8, or float32 for data that are no pictures. draw: the number of the draw, of several
        for the same images. Raises ArgumentError for what is no tensor, and for uniform noise on data that are
        no pictures.
        """
        if not isinstance(images, Tensor):
            raise ArgumentError("images", "a tensor of uint8 or float32", kind_of(images))
        v = images.cpu().numpy().astype(np.float32)
        if images.is_floating_point():
            if self.kind == "uniform":
                raise ArgumentError("noise", "'gaussian', as only 8-bit values can be dequantised", "'uniform'")
        elif self.kind != "uniform":
            v = scaled(v)
        if self.kind == "none":
            return torch.from_numpy(v)
        noise = np.empty(v.shape, np.float32)
        for i, values in enumerate(noise, start=first):
            rng = np.random.default_rng([self.seed, i, draw])
            fill = rng.random if self.kind == "uniform" else rng.standard_normal
            fill(dtype=np.float32, out=values)
        if self.kind == "uniform":
            return torch.from_numpy(dequantized(v, noise))
        return torch.from_numpy(v + self.std * noise)
