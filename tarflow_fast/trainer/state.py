"""A `TrainState` is the state of a run between two steps; `save` and `restore` keep it in a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..checkpoints.torch_files import save_torch
from ..data import DEMONSTRATIONS
from ..errors import ArgumentError, CheckpointError, TrainingDiverged, first_line
from ..files import replacing
from ..models.config import TarFlowConfig
from .config import FREE_ON_RESUME, PATHS, TrainConfig
from .flow_config import FlowConfig

CHECKPOINT = "checkpoint.pt"
FORMAT = 1


def ema_decay(limit: float, s: int) -> float:
    """min(limit, (1 + s)/(10 + s)) is the decay of the update after s others, which forgets the start soon."""
    return min(limit, (1 + s) / (10 + s))


class TrainState:
    """A `TrainState` has the model, its moving average, the optimiser, the number of steps done, and the sums of the
    unfinished row of metrics.

    There is no state of a random generator: whatever is random is a function of (seed, step), see `Batches`.

    model: the model, whose `metadata` its file records. config: the run. names: what is summed over the steps since the
    last row of metrics. sizes: what the checkpoint records of the model's shape. data_shape: the shape of one datum.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        names: tuple[str, ...],
        sizes: dict[str, Any],
        data_shape: tuple[int, ...],
    ):
        def average(means: Any, values: Any, _: Tensor | int) -> None:
            torch._foreach_lerp_(means, values, 1 - ema_decay(config.ema_decay, self.step))

        self.model, self.names, self.sizes, self.data_shape = model, names, sizes, data_shape
        self.ema = AveragedModel(model, multi_avg_fn=average)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True
        )
        self.step = 0
        self.seconds = 0.0
        self.sums = torch.zeros(len(names), dtype=torch.float32, device=next(model.parameters()).device)
        self.summed = 0

    @property
    def average(self) -> nn.Module:
        """The averaged model, which is evaluated and saved."""
        module: nn.Module = self.ema.module
        return module

    @property
    def metadata(self) -> dict[str, Any]:
        """What the file of the averaged model records beside its weights."""
        found: Any = self.average.metadata
        assert isinstance(found, dict)
        return found

    def save(self, path: Path, config: TrainConfig, fingerprint: int) -> None:
        """Writes the whole state; the file appears whole or not at all. Raises TrainingDiverged for weights that broke.

        fingerprint: the checksum of the data, which `restore` compares.
        """
        for module in (self.model, self.average):
            if not all(bool(value.isfinite().all()) for value in module.state_dict().values()):
                raise TrainingDiverged(f"weights are not finite by step {self.step}; try a lower lr or clip_norm")
        recorded = config.to_dict()
        content = {
            "format": FORMAT,
            "config": recorded | {name: _whole(recorded[name]) for name in PATHS if recorded[name]},
            "fingerprint": fingerprint,
            "sizes": self.sizes,  # these two make it a model's file, for `load`
            "metadata": {**self.metadata, "steps": self.step},
            "model": self.model.state_dict(),
            "ema": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "sums": self.sums,
            "summed": self.summed,
        }
        with replacing(path, durable=True) as partial:
            save_torch(content, partial)

    def restore(self, path: Path, config: TrainConfig, fingerprint: int) -> None:
        """Takes over what `save` wrote. Raises CheckpointError for a broken file, ArgumentError for another run's."""
        content = _read(path, self.sums.device)
        _changed(_recorded(path, content), {field.name: getattr(config, field.name) for field in fields(config)})
        if content["fingerprint"] != fingerprint:
            raise ArgumentError("data", "the images of the run to be continued", "others")
        metadata = content.get("metadata", {})
        before, now = metadata.get("class_names"), self.metadata.get("class_names")
        if metadata and before != now:
            raise ArgumentError("data", f"the classes of the run to be continued, {before!r}", repr(now))
        if content.get("sizes", self.sizes) != self.sizes:
            raise ArgumentError("data", "data of the shape in the run to be continued", self.data_shape)
        self.metadata.update(metadata)
        try:
            for module, name in ((self.model, "model"), (self.average, "ema")):
                _check_weights(module, content[name])
                module.load_state_dict(content[name])
            self.optimizer.load_state_dict(content["optimizer"])
            for parameter, moments in self.optimizer.state.items():
                if any(moments[name].shape != parameter.shape for name in ("exp_avg", "exp_avg_sq")):
                    raise ValueError("the optimiser's moments have other shapes than the weights")
            self.sums.copy_(content["sums"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: not a whole training checkpoint ({first_line(error)})") from error
        self.step, self.seconds, self.summed = content["step"], content["seconds"], content["summed"]
        self.ema.n_averaged.fill_(self.step)


def _whole(path: str) -> str:
    """Returns the absolute path, or the name of a demonstration as it is."""
    return path if path in DEMONSTRATIONS and not os.path.exists(path) else os.path.abspath(path)


def continued(out: Path, given: Mapping[str, Any]) -> TrainConfig:
    """Returns the configuration that the run in `out` has recorded, with the changes that are given.

    Raises CheckpointError for a broken checkpoint, ArgumentError for a change that a run cannot take.
    """
    path = out / CHECKPOINT
    config = _recorded(path, _read(path, torch.device("cpu"), mmap=True))
    _changed(config, given)
    return replace(config, **{"out": str(out), **given})


def _changed(recorded: TrainConfig, given: Mapping[str, Any]) -> None:
    """Raises ArgumentError for an option that is not as recorded and has to be."""
    for name, value in given.items():
        before = getattr(recorded, name)
        if name not in FREE_ON_RESUME and before != value:
            expected, got = (str(each) if isinstance(each, FlowConfig) else repr(each) for each in (before, value))
            raise ArgumentError(name, f"{expected}, as in the run to be continued", got)


def _read(path: Path, device: torch.device, *, mmap: bool = False) -> dict[str, Any]:
    """Returns what `save` wrote. Raises CheckpointError for a file that it did not write whole.

    mmap: whether tensors are read when they are used; the file is then in use until they are gone.
    """
    try:
        content = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except Exception as error:  # a foreign or damaged file may make the parser raise anything
        raise CheckpointError(f"{path}: not a whole training checkpoint ({first_line(error)})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a training checkpoint of format {FORMAT}")
    kinds: dict[str, Any] = {"config": dict, "fingerprint": int, "model": dict, "ema": dict, "optimizer": dict}
    for name, kind in {**kinds, "step": int, "seconds": (int, float), "sums": Tensor, "summed": int}.items():
        if not isinstance(content.get(name), kind):
            raise CheckpointError(f"{path}: not a whole training checkpoint (no {name})")
    if content["step"] < 0 or content["sums"].dim() != 1 or not isinstance(content.get("metadata", {}), dict):
        raise CheckpointError(f"{path}: not a whole training checkpoint (a wrong step, sums or metadata)")
    return content


def begun_with(path: Path) -> tuple[TarFlowConfig, list[str] | None] | None:
    """Returns (sizes, class names) of the model that this checkpoint's run started from, or None if there was none."""
    content = _read(path, torch.device("cpu"), mmap=True)
    metadata = content.get("metadata", {})
    if "init" not in metadata or "sizes" not in content:
        return None
    return TarFlowConfig(**content["sizes"]), metadata.get("class_names")


def _recorded(path: Path, content: Mapping[str, Any]) -> TrainConfig:
    """Returns the configuration in a checkpoint; an option that it does not know yet has its default."""
    known = {field.name for field in fields(TrainConfig)}
    for name in content["config"]:
        if name not in known:
            raise CheckpointError(f"{path}: its configuration has {name!r}, which this version does not know")
    try:
        return TrainConfig(**content["config"])
    except (ArgumentError, TypeError) as error:
        raise CheckpointError(f"{path}: not a whole training checkpoint ({error})") from error


def _check_weights(module: nn.Module, weights: Mapping[str, Any]) -> None:
    """Raises ValueError for weights that are not finite tensors; load_state_dict checks their names and shapes."""
    for name, value in weights.items():
        if not isinstance(value, Tensor) or not value.isfinite().all():
            raise ValueError(f"{name!r} is not finite")
