"""This module makes a stand-in for a checkout of ml-tarflow of `tarflow_fast.reference`, and runs a suite beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from torch import Tensor

import tarflow_fast
from bench.__main__ import main
from bench.common import limits
from bench.common.harness import TOLERANCE
from bench.suites import density
from tarflow_fast import TarFlow

STAND_IN = """
import torch
from tarflow_fast import reference

seen = []

class Model(torch.nn.Module):
    def __init__(self, in_channels, img_size, patch_size, channels, num_blocks, layers_per_block, nvp, num_classes):
        super().__init__()
        self.patch_size = patch_size

    def load_state_dict(self, weights):
        self.weights = {name: torch.nn.Parameter(value) for name, value in weights.items()}
        for name, value in self.weights.items():
            self.register_parameter(name.replace(".", " "), value)

    def reverse(self, x, y=None, guidance=0):
        seen.append((len(x), y is not None, guidance))
        images = reference.unpatchify(reference.inverse(self.weights, x, y, guidance=guidance).x, self.patch_size)
        return SPOIL(images)

    def forward(self, x, y=None):
        density = reference.density(self.weights, SPOIL(reference.patchify(x, self.patch_size)), y)
        return density.z, density.outputs, density.log_det / density.z[0].numel()

    def get_loss(self, z, log_dets):
        return 0.5 * z.pow(2).mean() - log_dets.mean()
"""
SPOILS = {
    "right": "lambda images: images",
    "a little off": f"lambda images: images + {1.5 * TOLERANCE}",
    "far off": "lambda images: images + 1",
    "nan": "lambda images: images.log()",
    "shape": "lambda images: images[:1]",
}


def stand_in(folder: Path, spoil: str = "right") -> Path:
    (folder / "transformer_flow.py").write_text(STAND_IN.replace("SPOIL", f"({SPOILS[spoil]})"))
    return folder


def quick_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets limits come from small and short measurements."""
    monkeypatch.setattr(limits, "SECONDS", 0.0)
    monkeypatch.setattr(limits, "MATRIX_SIZE", 64)
    monkeypatch.setattr(limits, "LARGE_BYTES", 2**20)


def wrong_density(monkeypatch: pytest.MonkeyPatch, error: float) -> None:
    """Gives what the backend "cpu" denoises an error."""

    def denoise(model: TarFlow, images: Tensor, y: Tensor | None, *, backend: str, **how: Any) -> Tensor:
        right = tarflow_fast.denoise(model, images, y, backend=backend, **how)
        return right + (error if backend == "cpu" else 0.0)

    monkeypatch.setattr(density, "denoise", denoise)


def bench(*arguments: str | Path | int) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])
