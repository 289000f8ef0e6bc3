"""A `TrainConfig` says what a training run is; it is checked once, and stored in the run's checkpoints."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..checks import check_choice, check_count, check_number
from ..data import LAYOUTS, VALUES
from ..errors import ArgumentError
from ..scalars import check_flag, plain
from ..sizes import Size, checked_size
from .flow_config import ONLY_TARFLOW, FlowConfig, defaults_for

NOISE_TYPES = ("gaussian", "uniform")
DTYPES = ("float32", "bfloat16")
SCHEDULES = ("cosine", "polynomial")

# These options may differ between a run and its continuation. `epochs` is among them as the schedule is a function of
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
NETWORK = ("channels", "num_blocks", "layers_per_block", "nvp", "head_dim")  # sizes of a model that data do not tell
MOST = 2**63 - 1  # no count is larger, as torch's own integers have no more

COUNTS = (
    *("channels", "num_blocks", "layers_per_block", "head_dim", "epochs"),
    *("log_every", "checkpoint_every", "eval_images", "sample_rows"),
)
COUNTS_OR_ZERO = ("warmup_steps", "eval_every", "sample_every", "seed")


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value)


@dataclass(frozen=True)
class TrainConfig:
    """A `TrainConfig` says what one training run is. All numbers of steps count optimiser steps.

    Attributes:
        data: The path of the images to learn, for `load_images` with split "train".
        out: The folder that the run writes.
        eval_data: The path of held-out images, for `load_images` with split "test", or None.
        img_size: The pixels along a side, or (height, width), to which pictures of a folder are brought, and which
            other data must have; None where the data tell it.
        in_channels: The number of channels of pictures of a folder, 1 or 3; other data tell their own.
        layout: The layout of an array's images, as in `load_images`; with "tokens" the data are sequences.
        values: The meaning of an array's floats, as in `load_images`.
        cache: The folder for images that memory has no room for, as in `load_images`.
        patch_size: The pixels along a patch's side, or (height, width). Sequences have no patches: it stays at its
            default for them.
        channels: The width of the transformers.
        num_blocks: The number of flow blocks.
        layers_per_block: The number of transformer layers of each flow block.
        nvp: Whether the blocks are affine, or else volume-preserving (shift only).
        head_dim: The number of channels of an attention head.
        conditional: Whether the model learns p(x | label), or else p(x).
        class_names: One name a class, in place of the data's own, or None.
        noise_type: The noise on the images, of 8-bit values v: "gaussian", x = v/127.5 − 1 + noise_std · ε, or
            "uniform", x = (v + u)/128 − 1 (dequantisation). Data that are no pictures take "gaussian" alone, x = v +
            noise_std · ε.
        noise_std: The level of Gaussian noise, on the scale of x.
        drop_label: The share of labels that are replaced by "no class", 0 to 1.
        flip: Whether half of the images are mirrored.
        epochs: The number of passes over the data.
        batch_size: The number of images in a step, over all processes, by default 256, or where there are fewer images,
            as many of them as the processes share evenly.
        lr: The highest learning rate, reached by a linear warm-up.
        min_lr: The learning rate at the end.
        schedule: The way from `lr` to `min_lr`: "cosine", or "polynomial", (1 − share of steps done)^decay_power.
        decay_power: The power of the polynomial.
        warmup_steps: The number of steps of the warm-up.
        weight_decay: The weight decay of AdamW, whose betas are 0.9 and 0.95.
        clip_norm: The limit of the gradient's norm, or None for none.
        ema_decay: The decay of the moving average of the weights, which is the model that is saved; after s steps it is
            at most (1 + s)/(10 + s).
        seed: The seed of weights, order, noise and dropped labels.
        dtype: "float32", or "bfloat16" for autocast.
        device: "cpu", "cuda", or "auto", a GPU where there is one.
        compile: Whether the model is trained under torch.compile.
        threads: The number of torch's threads on the CPU while it trains, by default as many as it has.
        log_every: The number of steps between rows of train.csv.
        checkpoint_every: The number of steps between checkpoints.
        eval_every: The number of steps between rows of eval.csv; 0 is one row, at the end.
        eval_images: The number of held-out images that are evaluated, all where there are fewer.
        sample_every: The number of steps between grids of samples; 0 is no grids.
        sample_rows: The number of rows of a grid, in which each class has a column.
        sample_guidance: The weight of the samples' guidance.
        tensorboard: Whether event files for TensorBoard are written too.
        flow: The family of flow that is trained in place of a TarFlow, or None. Its defaults of the other options are
            those of `for_flow`.

    Raises:
        ArgumentError: An option has the wrong type or range, or does not go with the others.
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
    schedule: str = "cosine"
    decay_power: float = 1.0
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
    flow: FlowConfig | None = None

    @classmethod
    def for_flow(cls, flow: str | FlowConfig, **options: Any) -> TrainConfig:
        """Returns the configuration of a run of a family, with defaults that fit families.

        Args:
            flow: The name of the family, or its whole configuration.
            **options: The fields of `TrainConfig`.

        Returns:
            The configuration.

        Raises:
            ArgumentError: As in `TrainConfig`.
        """
        flow = FlowConfig(flow) if isinstance(flow, str) else flow
        return cls(**{**defaults_for(flow.name, options.get("data")), **options, "flow": flow})

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
        check_choice("schedule", self.schedule, SCHEDULES)
        check_number("decay_power", self.decay_power, 0, open_low=True)
        check_number("weight_decay", self.weight_decay, 0)
        check_number("sample_guidance", self.sample_guidance, 0)
        if self.clip_norm is not None:
            check_number("clip_norm", self.clip_norm, 0, open_low=True)
        check_number("ema_decay", self.ema_decay, 0)
        if self.ema_decay >= 1:
            raise ArgumentError("ema_decay", "a number < 1", repr(self.ema_decay))
        flow: Any = self.flow
        if isinstance(flow, dict):  # a checkpoint has it so
            object.__setattr__(self, "flow", FlowConfig(**flow))
        if self.flow is not None:
            self._check_for_flow(self.flow)
        elif self.eval_every and self.eval_data is None:
            raise ArgumentError("eval_data", "a path, as eval_every is given", None)
        if not isinstance(self.device, str):
            raise ArgumentError("device", "a string", repr(self.device))
        if self.layout == "tokens":
            self.check_for_sequences()

    def _check_for_flow(self, flow: FlowConfig) -> None:
        """Raises ArgumentError for an option that means nothing for a family and is not at its default."""
        if not isinstance(flow, FlowConfig):
            raise ArgumentError("flow", "a FlowConfig or None", repr(flow))
        if self.layout == "tokens":
            raise ArgumentError("layout", "'auto', as families take tokens (N, T) of integers", repr(self.layout))
        for field in fields(self):
            if field.name in ONLY_TARFLOW and getattr(self, field.name) != field.default:
                expected = f"{field.default!r}, its default, as {flow.name!r} has no such option"
                raise ArgumentError(field.name, expected, repr(getattr(self, field.name)))

    def check_for_sequences(self) -> None:
        """Checks that no option is given that means nothing where the data are sequences.

        Raises:
            ArgumentError: Such an option differs from its default.
        """
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
        """Returns the options as a dict.

        Returns:
            The value of each option by its name.
        """
        return asdict(self)

    def batch_size_for(self, images: int, processes: int) -> int:
        """Returns `batch_size`, or by default as many images up to 256 as there are and as the processes share evenly.

        Args:
            images: The number of images to learn.
            processes: The number of processes that share a batch.

        Returns:
            The number of images in a step, over all processes.
        """
        if self.batch_size is not None:
            return self.batch_size
        return max(min(DEFAULT_BATCH, images) // processes, 1) * processes

    def learning_rate(self, step: int, steps: int) -> float:
        """Returns the learning rate of a step: a linear warm-up to `lr`, then `schedule` down to `min_lr`.

        Args:
            step: The number of the optimiser step, from 0.
            steps: The number of all steps of the run.

        Returns:
            The learning rate.
        """
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        done = min((step - self.warmup_steps) / max(1, steps - self.warmup_steps), 1.0)
        if self.schedule == "cosine":
            return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * done))
        return self.min_lr + (self.lr - self.min_lr) * (1 - done) ** self.decay_power
