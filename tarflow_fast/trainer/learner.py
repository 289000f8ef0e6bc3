"""A `Learner` is what a run trains: the loop knows of models and data what is here, and nothing else."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, TarFlowWarning
from .config import DEFAULT_BATCH, TrainConfig
from .processes import Processes

MOST_STEPS = 10**10  # at a thousandth of a second each they take months

Row = dict[str, float]
Forward = Callable[..., Any]


class BatchesLike(Protocol):
    """What the loop needs of batches."""

    size: int
    data: Any

    @property
    def steps_per_epoch(self) -> int: ...

    def __call__(self, step: int) -> tuple[Tensor, Tensor | None]: ...


@dataclass(frozen=True)
class Outcome:
    """What a step minimises, and what it shows.

    loss: () fp32. figures: one value for each of `Learner.figures`, without gradients. latents: (B, …), what
    `Learner.after_step` needs, or None.
    """

    loss: Tensor
    figures: tuple[Tensor, ...] = ()
    latents: Tensor | None = None


class Learner(ABC):
    """A `Learner` has read its data and made its model when it is there.

    Attributes:
        config: The run, with its batch size.
        batches: The batch of each step.
        held_out: The held-out data, or None.
        model: The model in training; its `metadata` are what its file records.
        sizes: What a checkpoint records of the shape of the model.
        kind: What messages call the data.
        figures: The names of what `Outcome.figures` are.
        measure: What messages call the figure of held-out data.
        steps: The number of steps of the run.
    """

    config: TrainConfig
    batches: BatchesLike
    held_out: Any
    model: nn.Module
    sizes: dict[str, Any]
    data_shape: tuple[int, ...]
    fingerprint: int
    kind: str
    figures: tuple[str, ...] = ()
    measure: str
    steps: int

    @property
    def trained(self) -> nn.Module:
        """The module whose forward is a step's pass: torch.compile and DistributedDataParallel wrap it."""
        return self.model

    @abstractmethod
    def outcome(self, forward: Forward, step: int) -> Outcome:
        """Returns the loss of batch number `step`. forward: `trained`, as it may be wrapped."""

    def after_step(self, outcome: Outcome) -> None:  # noqa: B027
        """Does what follows the optimiser's step, which may be nothing."""

    def layers(self) -> Row:
        """Returns figures of each layer since the last call, which may be none."""
        return {}

    def starts(self) -> list[str]:
        """Returns lines that tell where a new run starts."""
        return []

    @abstractmethod
    def is_written(self, average: nn.Module, path: Path) -> bool:
        """Returns whether the file has this model: a run may be killed between its checkpoint and its model."""

    @abstractmethod
    def write(self, average: nn.Module, path: Path) -> None:
        """Writes the model."""

    @abstractmethod
    def evaluate(self, average: nn.Module) -> Row:
        """Returns figures of the held-out data, with the same names at every call. Raises TarFlowError if none."""

    def told(self, row: Row) -> str | None:
        """Returns a line that tells these figures of held-out data, or None where they are in the file alone."""
        return None

    @abstractmethod
    def draw(self, average: nn.Module, path: Path) -> None:
        """Writes a picture of samples. Raises TarFlowError where there is none."""

    def plan(self, count: int, batches: Callable[[TrainConfig], BatchesLike], group: Processes) -> None:
        """Sets `config` with its batch size, `batches` and `steps`. count: how many samples there are to learn.

        A warning tells a batch size that is not the usual default.
        """
        config, world = self.config, group.world
        size = config.batch_size_for(count, world)
        if config.batch_size is None and size != DEFAULT_BATCH and group.first:
            among = f" and {world} processes" if world > 1 else ""
            said = f"for {count} {self.kind}{among} batch_size={size} is taken, not {DEFAULT_BATCH}"
            warnings.warn(said, TarFlowWarning, stacklevel=5)
        self.config = replace(config, batch_size=size)
        self.batches = batches(self.config)
        self.steps = config.epochs * self.batches.steps_per_epoch
        if self.steps > MOST_STEPS:
            most = MOST_STEPS // self.batches.steps_per_epoch
            raise ArgumentError("epochs", f"at most {most}, which are {MOST_STEPS:,} steps", config.epochs)


def precision(config: TrainConfig, device: torch.device) -> torch.autocast:
    """Returns the context of a step's pass: autocast to bfloat16 where the run has it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")
