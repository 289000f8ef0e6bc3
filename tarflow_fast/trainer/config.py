"""What a training run is: sizes, noise, schedule; checked once, stored in its checkpoints."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..checks import check_choice, check_count, check_number
from ..data import LAYOUTS, VALUES
from ..errors import ArgumentError
from ..scalars import check_flag, plain
from ..sizes import Size, checked_size

NOISE_TYPES = ("gaussian", "uniform")
DTYPES = ("float32", "bfloat16")

# What may differ between a run and its continuation. `epochs` is among them as the schedule is a function of
# the step: a run continued with another number of epochs follows the new schedule from there on.
FREE_ON_RESUME = frozenset(
    {
        "data",
        "out",
        "eval_data",
        "layout",
        "values",
        "cache",
        "epochs",
        "device",
        "compile",
        "log_every",
        "checkpoint_every",
        "eval_every",
    }
    | {"eval_images", "sample_every", "sample_rows", "sample_guidance", "tensorboard", "threads"}
)
PATHS = ("data", "eval_data", "out")
DEFAULT_BATCH = 256
DEFAULT_PATCH = 4
NETWORK = ("channels", "num_blocks", "layers_per_block", "nvp", "head_dim")  # of a model's sizes, what data do not tell
MOST = 2**63 - 1  # of any count, as torch's own integers have no more

COUNTS = (
    *("channels", "num_blocks", "layers_per_block", "head_dim", "epochs"),
    *("log_every", "checkpoint_every", "eval_images", "sample_rows"),
)
COUNTS_OR_ZERO = ("warmup_steps", "eval_every", "sample_every", "seed")


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value)


@dataclass(frozen=True)
class TrainConfig:
    """One training run. All numbers of steps count optimiser steps.

    Data: data, eval_data: paths for `load_images` (splits "train" and "test"); out: the folder to be written.
    img_size, in_channels: for folders of pictures, else read off the data; layout, values, cache: as for `load_images`.
    conditional: learn p(x | label);
    class_names: one name a class, in place of the data's own. flip: mirror half of the images. noise_type:
    "gaussian", x = v/127.5 − 1 + noise_std · ε, or "uniform", x = (v + u)/128 − 1 (dequantisation), for 8-bit
    values v. drop_label: share of labels replaced by "no class".

    Model: patch_size, channels, num_blocks, layers_per_block, nvp, head_dim: as in `TarFlowConfig`. Of sequences
    (layout "tokens") a token is one of the model's, so that patch_size stays at its default.

    Schedule: epochs; batch_size, over all processes, by default 256, or all images where there are fewer; lr:
    reached by a linear warm-up over warmup_steps, and left by a cosine that ends at min_lr; weight_decay of AdamW
    (betas 0.9, 0.95); clip_norm: limit of the gradient's norm, None for none; ema_decay: of the moving average of
    the weights, which is the model that is saved, ramped as (1 + s)/(10 + s) after s steps; seed.

    Machine: dtype: "float32", or "bfloat16" for autocast; device: "cpu", "cuda", or "auto", a GPU where
    there is one; compile: torch.compile; threads: of torch on a CPU, while it trains, default as many as it has.

    Output: log_every, checkpoint_every, eval_every, sample_every: steps between rows of metrics, checkpoints,
    held-out evaluations and sample grids (0: one evaluation, at the end, and no grids); eval_images: how many
    held-out images; sample_rows: rows of a grid, a class a column; sample_guidance: guidance of the samples;
    tensorboard: write event files.

    Raises ArgumentError for what cannot be.
    """

    data: str
    out: str
    eval_data: str | None = None
    img_size: Size | None = None
    in_channels: int = 3
    layout: str = "auto"
    values: str = "auto"
    cache: str | None = None
    patch_size: Size = DEFAULT_PATCH
    channels: int = 512
    num_blocks: int = 8
    layers_per_block: int = 8
    nvp: bool = True
    head_dim: int = 64
    conditional: bool = True
    class_names: tuple[str, ...] | None = None
    noise_type: str = "gaussian"
    noise_std: float = 0.05
    drop_label: float = 0.1
    flip: bool = False
    epochs: int = 100
    batch_size: int | None = None
    lr: float = 1e-4
    min_lr: float = 1e-6
    warmup_steps: int = 1000
    weight_decay: float = 1e-4
    clip_norm: float | None = 1.0
    ema_decay: float = 0.999
    seed: int = 0
    dtype: str = "bfloat16"
    device: str = "auto"
    compile: bool = False
    threads: int | None = None
    log_every: int = 50
    checkpoint_every: int = 500
    eval_every: int = 0
    eval_images: int = 1000
    sample_every: int = 0
    sample_rows: int = 4
    sample_guidance: float = 0.0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))
        for name in ("data", "out"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ArgumentError(name, "a path", repr(getattr(self, name)))
        if self.eval_data is not None and not isinstance(self.eval_data, str):
            raise ArgumentError("eval_data", "a path or None", repr(self.eval_data))
        for name in PATHS:
            if "\0" in (getattr(self, name) or ""):
                raise ArgumentError(name, "a path", repr(getattr(self, name)))
        for name in ("nvp", "conditional", "flip", "compile", "tensorboard"):
            object.__setattr__(self, name, check_flag(name, getattr(self, name)))
        for name in COUNTS:
            check_count(name, getattr(self, name))
        for name in COUNTS_OR_ZERO:
            check_count(name, getattr(self, name), low=0)
        for name in ("threads", "batch_size"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        for name in ("img_size", "patch_size"):
            if getattr(self, name) is not None or name == "patch_size":
                object.__setattr__(self, name, checked_size(name, getattr(self, name)))
        for name in (*COUNTS, *COUNTS_OR_ZERO, "threads", "batch_size"):
            if (getattr(self, name) or 0) > MOST:
                raise ArgumentError(name, f"an integer <= {MOST}", getattr(self, name))
        if self.in_channels not in (1, 3):
            raise ArgumentError("in_channels", "1 or 3", repr(self.in_channels))
        names = self.class_names
        if names is not None and not (isinstance(names, tuple) and names and all(map(_is_name, names))):
            raise ArgumentError("class_names", "a tuple of names or None", repr(names))
        if names is not None and not self.conditional:
            raise ArgumentError("class_names", "None, as the model is unconditional", repr(names))
        check_choice("noise_type", self.noise_type, NOISE_TYPES)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("layout", self.layout, LAYOUTS)
        check_choice("values", self.values, VALUES)
        if self.cache is not None and not isinstance(self.cache, str):
            raise ArgumentError("cache", "a path or None", repr(self.cache))
        check_number("noise_std", self.noise_std, 0, open_low=True)
        check_number("drop_label", self.drop_label, 0, 1)
        check_number("lr", self.lr, 0, open_low=True)
        check_number("min_lr", self.min_lr, 0, self.lr)
        check_number("weight_decay", self.weight_decay, 0)
        check_number("sample_guidance", self.sample_guidance, 0)
        if self.clip_norm is not None:
            check_number("clip_norm", self.clip_norm, 0, open_low=True)
        check_number("ema_decay", self.ema_decay, 0)
        if self.ema_decay >= 1:
            raise ArgumentError("ema_decay", "a number < 1", repr(self.ema_decay))
        if self.eval_every and self.eval_data is None:
            raise ArgumentError("eval_data", "a path, as eval_every is given", None)
        if not isinstance(self.device, str):
            raise ArgumentError("device", "a string", repr(self.device))
        if self.layout == "tokens":
            self.check_for_sequences()

    def check_for_sequences(self) -> None:
        """Raises ArgumentError for options that mean nothing where the data are sequences."""
        for name, only, why in (
            ("img_size", None, "None, as sequences have no pixels"),
            ("patch_size", DEFAULT_PATCH, f"{DEFAULT_PATCH}, its default, as sequences have no patches"),
            ("noise_type", "gaussian", "'gaussian', as only 8-bit values can be dequantised"),
            ("flip", False, "False, as sequences have no mirror image"),
            ("sample_every", 0, "0, as sequences make no picture"),
        ):
            if getattr(self, name) != only:
                raise ArgumentError(name, why, repr(getattr(self, name)))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def batch_size_for(self, images: int, processes: int) -> int:
        """Images a step; by default as many up to DEFAULT_BATCH as there are and as the processes share evenly."""
        if self.batch_size is not None:
            return self.batch_size
        return max(min(DEFAULT_BATCH, images) // processes, 1) * processes

    def learning_rate(self, step: int, steps: int) -> float:
        """lr of optimiser step number `step` (from 0) out of `steps`."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
