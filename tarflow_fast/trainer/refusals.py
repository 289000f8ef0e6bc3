"""A run is refused, as far as that can be told before data is read, where its folder or its options cannot be."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from ..backend import check_compile
from ..errors import ArgumentError
from ..models.config import TarFlowConfig
from ..models.tarflow import TarFlow
from .config import NETWORK, TrainConfig
from .limits import check_fits
from .outputs import MODEL, SAMPLES, UNCONDITIONAL_COLUMNS
from .state import CHECKPOINT

OURS = (CHECKPOINT, MODEL, "train.csv", "eval.csv", "layers.csv")
MOST_PIXELS = 10**9  # a grid of samples has no more


def resumes(out: Path, resume: bool, killed: bool) -> bool:
    """Returns whether the run goes on from a checkpoint. Raises ArgumentError for a folder that it cannot have."""
    if resume and (out / CHECKPOINT).is_file():
        return True
    if resume and not killed:
        raise ArgumentError("resume", f"a checkpoint {out / CHECKPOINT}", "none")
    for name in OURS:
        if os.path.lexists(out / name):
            without = "a checkpoint, or resume=True" if name == CHECKPOINT else f"{name}, which the run would replace"
            raise ArgumentError("out", f"a folder without {without}", repr(str(out)))
    return False


def check_options(config: TrainConfig, device: torch.device, rows: int, source: TarFlow | None) -> None:
    """Raises an error for options that cannot be, as far as that can be told before data is read."""
    samples = Path(config.out) / SAMPLES
    check_compile(config.compile, device)
    if config.eval_data is not None and not os.path.exists(config.eval_data):
        raise ArgumentError("eval_data", "a file or folder that is there", repr(config.eval_data))
    if config.sample_guidance and not config.conditional:
        raise ArgumentError("sample_guidance", "0, as the model is unconditional", config.sample_guidance)
    if os.path.lexists(samples) and not samples.is_dir() and config.sample_every:
        raise ArgumentError("out", "a folder whose samples is a folder", repr(config.out))
    if source is not None:
        check_fits(source.config, rows, device)
    elif config.img_size is not None:
        sizes = {name: getattr(config, name) for name in ("in_channels", "img_size", "patch_size", *NETWORK)}
        check_fits(TarFlowConfig(**sizes), rows, device)


def check_grid(config: TrainConfig, sizes: TarFlowConfig) -> None:
    """Raises ArgumentError where no grid can be made of samples of a model of these sizes."""
    if not config.sample_every:
        return
    if sizes.in_channels not in (1, 3):
        raise ArgumentError("sample_every", f"0, as {sizes.in_channels} channels make no picture", config.sample_every)
    row = (sizes.num_classes or UNCONDITIONAL_COLUMNS) * math.prod(sizes.image_size)
    if row * config.sample_rows > MOST_PIXELS:
        most = f"at most {MOST_PIXELS // row} (a picture of {MOST_PIXELS:,} pixels)"
        raise ArgumentError("sample_rows", most, config.sample_rows)
