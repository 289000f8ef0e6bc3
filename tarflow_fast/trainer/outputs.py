"""What a run writes of its averaged model: the model itself, its bits/dim on held-out data, and a grid of samples."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from ..data import ImageData
from ..errors import TarFlowError
from ..evaluation import Noise, bits_per_dim
from ..images import save_grid
from ..models.tarflow import TarFlow
from ..sampling.sampler import Sampler
from .config import TrainConfig

MODEL, SAMPLES = "model.safetensors", "samples"
UNCONDITIONAL_COLUMNS = 8

Model = TypeVar("Model", bound=nn.Module)


def is_written(model: Model, path: Path, load: Callable[[Path], Model], facts: Callable[[Model], object]) -> bool:
    """Returns whether the file has this model: a run may be killed between its checkpoint and its model.

    load: reads such a file. facts: what a model is beside its weights.
    """
    try:
        found = load(path)
    except (TarFlowError, OSError):
        return False
    weights = model.state_dict()
    same = all(torch.equal(value, weights[key].cpu()) for key, value in found.state_dict().items())
    return same and facts(found) == facts(model)


def write_model(model: Model, path: Path, save: Callable[[Model, Path], object]) -> None:
    """Writes the model by `save`, and waits until the disk has it."""
    save(model, path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def held_out_bits(model: TarFlow, held_out: ImageData, seed: int) -> float:
    """Returns bits/dim of held-out data in fp32, by the same noise at every call.

    Raises TarFlowError where there are none: early on a density may be infinite or NaN.
    """
    return bits_per_dim(model, held_out, noise=Noise.of(model, seed=seed)).mean


def draw_grid(model: TarFlow, config: TrainConfig, path: Path) -> None:
    """Writes a grid of the model's samples, a class a column, from the same noise at every call.

    Raises TarFlowError where there is none: early on images may not be finite; they may be too many for the memory.
    """
    classes = model.config.num_classes
    columns = classes or UNCONDITIONAL_COLUMNS
    samples = Sampler(model, solver="sequential", probe="never").sample(
        columns * config.sample_rows,
        list(range(classes)) if classes else None,
        seed=config.seed,
        guidance=config.sample_guidance if classes else 0.0,  # guidance is towards a class
        denoise=config.noise_type == "gaussian",
        on_nonfinite="redraw",
    )
    save_grid(samples.images, path, columns)
