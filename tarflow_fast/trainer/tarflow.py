"""The `Learner` of TarFlow: images or sequences with noise, and the model's own loss."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints import load, save
from ..data import ImageData, renamed
from ..devices import own_defaults
from ..errors import ArgumentError
from ..models.tarflow import TarFlow
from .batches import Batches
from .config import TrainConfig
from .learner import Forward, Learner, Outcome, Row, precision
from .limits import check_fits
from .outputs import draw_grid, held_out_bits, is_written, write_model
from .processes import Processes
from .refusals import check_grid, check_options
from .run_data import DataReader, model_config, run_metadata
from .start import Init, given_options, read_init, sizes_of, with_classes_of
from .state import begun_with


class TarFlowLearner(Learner):
    """A `TarFlowLearner` trains a TarFlow.

    config: the run. group: its processes. init: the model to start from. checkpoint: the checkpoint from which the run
    goes on, or None. bar: whether a bar shows while data are read.
    """

    figures = ("half_z2", "log_det")
    measure = "bits/dim"
    model: TarFlow
    batches: Batches
    held_out: ImageData | None

    def __init__(self, config: TrainConfig, group: Processes, init: Init | None, checkpoint: Path | None, bar: bool):
        self.group = group
        start = self._start = None if init is None else read_init(init, given_options(config))
        source = None if start is None else start.model
        if source is not None:
            config = replace(config, **sizes_of(source, given_options(config)))
        check_options(config, group.device, math.ceil((config.batch_size or 1) / group.world), source)

        reader = DataReader(config, group, bar)
        own = reader.read(config.data, "train")
        if own.sequences:
            config.check_for_sequences()
        data = own if config.class_names is None else renamed(own, config.class_names)
        begun = None if checkpoint is None else begun_with(checkpoint)
        if source is not None:
            begun = source.config, source.metadata.get("class_names")
        if begun is not None:
            data = with_classes_of(begun[0].num_classes, begun[1], data)
            own = own if own.numbers is None else replace(data, class_names=None)  # the numbers are the model's labels
        sizes = model_config(config, data) if begun is None else begun[0]
        shape = tuple(data.images.shape[1:])
        if shape != sizes.data_shape:
            raise ArgumentError("init", f"a model of {data.kind} of shape {shape}", sizes.data_shape)
        self.kind, self.config = data.kind, config
        self.plan(len(data), lambda run: Batches(data, run, group.device, group.rank, group.world), group)
        config = self.config
        check_fits(sizes, self.batches.size // group.world, group.device)
        self.held_out = reader.read_held_out(data, own)
        check_grid(config, sizes)
        with own_defaults():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                self.model = TarFlow.from_config(sizes).to(group.device)
            if source is not None:
                self.model.load_state_dict(source.state_dict())
        self.model.metadata = run_metadata(config, data) | ({} if start is None else {"init": start.name})
        self.sizes, self.data_shape = sizes.to_dict(), sizes.data_shape
        self.fingerprint = data.fingerprint

    def outcome(self, forward: Forward, step: int) -> Outcome:
        x, y = self.batches(step)
        with precision(self.config, self.group.device):
            z, _, log_det = forward(x, y)
        loss = self.model.get_loss(z, log_det)
        with torch.no_grad():
            return Outcome(loss, (0.5 * z.square().mean(), log_det.mean()), z)

    def after_step(self, outcome: Outcome) -> None:
        """Updates the prior of a volume-preserving model by the z of all processes."""
        z = outcome.latents
        if self.config.nvp or z is None:
            return
        if self.group.world > 1:
            z = self.group.mean(z.square().mean(0, keepdim=True)).sqrt()
        self.model.update_prior(z)

    def starts(self) -> list[str]:
        start, lines = self._start, []
        if start is not None:
            for key, now in self.model.metadata.items():
                before = start.model.metadata.get(key, now)
                if key.startswith("noise") and before != now:
                    lines.append(f"{start.name} was trained with {key} {before!r}; this run has {now!r}")
        return lines

    def is_written(self, average: nn.Module, path: Path) -> bool:
        return is_written(_tarflow(average), path, load, lambda model: (model.config, model.metadata))

    def write(self, average: nn.Module, path: Path) -> None:
        write_model(_tarflow(average), path, save)

    def evaluate(self, average: nn.Module) -> Row:
        assert self.held_out is not None
        return {"bits_per_dim": held_out_bits(_tarflow(average), self.held_out, self.config.seed)}

    def draw(self, average: nn.Module, path: Path) -> None:
        draw_grid(_tarflow(average), self.config, path)


def _tarflow(model: Any) -> TarFlow:
    assert isinstance(model, TarFlow)
    return model
