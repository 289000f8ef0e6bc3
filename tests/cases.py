"""This module has the models and inputs that tests share: golden cases, and random small models with seeded weights."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import cuda_emulation
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tarflow_fast.backend.cuda.engine import cuda_missing
from tarflow_fast.models.tarflow import TarFlow

TESTS = Path(__file__).parent
"""The folder of the helper modules, which processes of their own are to find."""
ROOT = TESTS.parent

KERNEL_DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
"""Where kernels run: on the GPU, or in Triton's interpreter and the emulation of CUDA (see conftest.py)."""


def cuda_kernel_missing() -> str | None:
    """Returns why the CUDA engine's kernel can run neither on a GPU nor in its emulation, or None."""
    if KERNEL_DEVICE.type == "cuda":
        return cuda_missing(KERNEL_DEVICE)
    return cuda_emulation.compiler_missing()


SMALL: dict[str, Any] = {
    "in_channels": 1,
    "img_size": 8,
    "patch_size": 2,
    "channels": 64,
    "num_blocks": 2,
    "layers_per_block": 1,
}
"""T = 16 tokens of D = 4 values, C = 64."""


def seeded_weights(shapes: Mapping[str, torch.Size], seed: int) -> dict[str, Tensor]:
    """Returns fp32 weights for a state dict, none of them trivial: xa of some tenths, every bias and norm in use.

    They are uniform values from Philox's raw bits keyed by (seed, name): the same on every machine and numpy version.
    """
    weights = {}
    for name, shape in shapes.items():
        bits = np.random.Philox(key=[seed, zlib.crc32(name.encode())]).random_raw(shape.numel())
        u = (bits >> np.uint64(11)) * 2.0**-52 - 1.0  # uniform in [-1, 1)
        if name.endswith("attn_mask"):
            value = np.tril(np.ones(shape))
        elif name == "var":
            volume_preserving = shapes["blocks.0.proj_out.weight"][0] == shape[1]
            value = 1 + 0.5 * u if volume_preserving else np.ones(shape)
        elif name.endswith("norm.weight"):
            value = 1 + 0.3 * u
        elif name.endswith(("pos_embed", "class_embed")):
            value = 0.5 * u
        elif name.endswith("proj_out.weight"):
            value = 0.4 * u / np.sqrt(shape[1])
        elif name.endswith("weight"):
            value = u / np.sqrt(shape[1])
        else:
            value = 0.1 * u
        weights[name] = torch.from_numpy(value.reshape(shape).astype(np.float32))
    return weights


def random_model(seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: Any) -> TarFlow:
    """Returns a TarFlow of the sizes of SMALL, or others if given, with seeded weights."""
    model = TarFlow(**{**SMALL, **sizes})
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    model.load_state_dict(seeded_weights(shapes, seed))
    return model.to(dtype)


def random_images(model: TarFlow, batch: int, seed: int = 0) -> Tensor:
    """Returns (batch, in_channels, H, W) standard normal values, in the model's dtype."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, *model.config.data_shape)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(model.dtype)


def random_latents(model: TarFlow, batch: int, seed: int = 0) -> Tensor:
    """Returns (batch, T, D) standard normal values, in the model's dtype."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, model.config.num_patches, model.config.token_dim)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(model.dtype)


def named(value: object) -> str:
    """Returns the name of a parametrised test's value: for a dict, its keys. Tensors may be memory as it was found,
    which would give a test another name in every process."""
    return " ".join(map(str, value)) if isinstance(value, dict) else str(value)


@dataclass(frozen=True)
class Case:
    """A golden case is a model, inputs, and what the published code made of them in fp32.

    constructor: arguments of the model; reverse_args: guidance and so on for "out.reverse"; noise_std: σ of
    "out.denoised". Tensors (`tensor`, `has`): in.image, in.y, in.y_dropped, in.z; out.forward_z, _logdet (a
    mean over T·D), _outputs (K, B, T, D); also forward_dropped_* and forward_nolabel_*; out.reverse,
    _sequence (K + 1, B, ch, H, W), _unguided; out.loss_at_unguided, grad_at_unguided, denoised_unguided.
    """

    name: str
    path: Path
    constructor: dict[str, Any]
    reverse_args: dict[str, Any]
    noise_std: float
    weights_seed: int | None

    @classmethod
    def read(cls, path: Path, name: str) -> Case:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        return cls(
            name,
            path,
            json.loads(metadata["constructor"]),
            json.loads(metadata["reverse"]),
            float(metadata["noise_std"]),
            int(metadata["weights_seed"]) if "weights_seed" in metadata else None,
        )

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        # The published denoised image's key carries its noise level, which noise_std has already.
        return {name.split("_std")[0]: value for name, value in load_file(self.path).items()}

    def has(self, name: str) -> bool:
        return name in self._tensors

    def tensor(self, name: str) -> Tensor:
        """Returns a copy, so that no test can spoil another's."""
        return self._tensors[name].clone()

    @property
    def y(self) -> Tensor | None:
        return self.tensor("in.y") if self.has("in.y") else None

    @property
    def weights(self) -> dict[str, Tensor]:
        """Returns the state dict, stored or made from weights_seed."""
        if self.weights_seed is not None:
            return random_model(self.weights_seed, **self.constructor).state_dict()
        prefix = "weights."
        return {n.removeprefix(prefix): self.tensor(n) for n in self._tensors if n.startswith(prefix)}

    def model(self) -> TarFlow:
        model = TarFlow(**self.constructor)
        model.load_state_dict(self.weights)
        return model


def _read_folder(folder: Path, prefix: str = "") -> list[Case]:
    return [Case.read(path, prefix + path.stem) for path in sorted(folder.glob("*.safetensors"))]


GOLDEN = _read_folder(TESTS / "golden")
if "TARFLOW_FAST_GOLDEN" in os.environ:  # more cases of the same layout
    GOLDEN += _read_folder(Path(os.environ["TARFLOW_FAST_GOLDEN"]), "extra-")
