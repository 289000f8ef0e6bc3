"""The `Learner` of a family of flows: its data, its preprocessing, and the family's own loss."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import DEMONSTRATIONS, FlowData, load_flow_data
from ..devices import own_defaults
from ..errors import ArgumentError
from ..evaluation import flow_score
from ..flows import FAMILIES, FamilyFlow, Preprocessed, build, describe, draw_picture, load, save
from ..flows.registry import known_one
from .batches import Order, stream
from .config import TrainConfig
from .flow_config import ONLY_LEVELS, FlowConfig
from .learner import Forward, Learner, Outcome, Row, precision
from .monitor import LayerMonitor
from .outputs import is_written, write_model
from .processes import Processes


class FamilyBatches:
    """`FamilyBatches` gives batch number `step`: samples in the order of the epoch's permutation, as they are.

    data: the samples to learn. config: the run. device: where the batches go. rank, world: the number of this process,
    and how many there are.
    """

    def __init__(self, data: FlowData, config: TrainConfig, device: torch.device, rank: int, world: int):
        self.size = config.batch_size_for(len(data), world)
        self.order = Order(len(data), self.size, config.seed, world, data.kind)
        rows = self.size // world
        self.rows = slice(rank * rows, (rank + 1) * rows)
        self.data, self.config, self.device = data, config, device
        self.labels = data.labels if config.conditional else None
        if config.conditional and data.labels is None:
            raise ArgumentError("conditional", "False, as the data has no labels", True)

    @property
    def steps_per_epoch(self) -> int:
        """The number of whole batches in the data."""
        return self.order.steps_per_epoch

    def __call__(self, step: int) -> tuple[Tensor, Tensor | None]:
        """Returns (x, y), this process's rows of batch number `step`; y is −1 for a dropped label."""
        x, y = self.whole(step)
        return x[self.rows], None if y is None else y[self.rows]

    def whole(self, step: int) -> tuple[Tensor, Tensor | None]:
        """Returns (x, y), the whole batch."""
        picked = self.order(step)
        x = self.data.values[picked].to(self.device)
        x = x.float() if self.data.levels else x
        random = stream(self.config.seed, "noise", step, self.device)
        mirrored, dropped = torch.rand(2, self.size, generator=random, device=self.device)
        if self.config.flip:
            x = torch.where((mirrored < 0.5)[:, None, None, None], x.flip(-1), x)
        if self.labels is None:
            return x, None
        return x, self.labels[picked].to(self.device).masked_fill(dropped < self.config.drop_label, -1)


class _Loss(nn.Module):
    """Its forward is the loss of a flow, so that DistributedDataParallel and torch.compile can wrap it."""

    def __init__(self, flow: FamilyFlow):
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor, y: Tensor | None, generator: torch.Generator) -> Tensor:
        return self.flow.loss(x, y, generator=generator)


class FamilyLearner(Learner):
    """A `FamilyLearner` trains a model of a family.

    config: the run. group: its processes. init: the model to start from, or the path of its file. checkpoint: the
    checkpoint from which the run goes on, or None. bar: whether a bar shows while data are read.
    """

    measure = "log-likelihood"
    model: FamilyFlow
    batches: FamilyBatches
    held_out: FlowData | None

    def __init__(self, config: TrainConfig, group: Processes, init: Any, checkpoint: Path | None, bar: bool):
        assert config.flow is not None
        self.config, self.group = config, group
        family = FAMILIES[known_one("flow", config.flow.name, FAMILIES)]
        data = self._read(config.data, "train", bar)
        self.kind = data.kind
        if data.kind not in family.kinds:
            raise ArgumentError("data", f"{' or '.join(family.kinds)}, which {config.flow.name!r} takes", data.kind)
        if config.flip and data.kind != "images":
            raise ArgumentError("flip", f"False, as {data.kind} have no mirror image", True)
        self.plan(len(data), lambda run: FamilyBatches(data, run, group.device, group.rank, group.world), group)
        self.held_out = self._read_held_out(data, bar)
        with own_defaults(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = model_for(config.flow, data, data.num_classes if config.conditional else 0)
            start = init if init is None or isinstance(init, FamilyFlow) else load(init)
            self.sizes = {key: value for key, value in describe(model).items() if key != "metadata"}
            if start is not None:
                given = {key: value for key, value in describe(start).items() if key != "metadata"}
                if given != self.sizes:
                    raise ArgumentError("init", f"a model like that of this run, {self.sizes}", given)
                model.load_state_dict(start.state_dict())
            self.model = model.to(group.device)
            self._check_data(data)
            if start is None and checkpoint is None:
                self._initialise()
        if config.conditional and data.class_names:
            model.metadata["class_names"] = list(data.class_names)
        if data.symbols:
            model.metadata["symbols"] = list(data.symbols)
        model.metadata |= {"kind": data.kind, "data": os.path.basename(config.data)}
        self._loss = _Loss(model)
        self._monitor = LayerMonitor(model, model.dims)
        self.data_shape, self.fingerprint = data.shape, data.fingerprint

    @property
    def trained(self) -> nn.Module:
        return self._loss

    def outcome(self, forward: Forward, step: int) -> Outcome:
        self.model.at_step(step, self.steps)
        x, y = self.batches(step)
        random = stream(self.config.seed, f"loss/{self.group.rank}", step, self.group.device)
        with precision(self.config, self.group.device):
            return Outcome(forward(x, y, random).float())

    def after_step(self, outcome: Outcome) -> None:
        self._monitor.step()

    def layers(self) -> Row:
        return self._monitor.row()

    def is_written(self, average: nn.Module, path: Path) -> bool:
        return is_written(_family(average), path, load, describe)

    def write(self, average: nn.Module, path: Path) -> None:
        write_model(_family(average), path, save)

    def evaluate(self, average: nn.Module) -> Row:
        assert self.held_out is not None
        model = _family(average).eval()
        return flow_score(model, self.held_out, seed=self.config.seed, conditional=self.config.conditional).row()

    def told(self, row: Row) -> str:
        return "held-out " + ", ".join(f"{name.replace('_', ' ')} {value:.5g}" for name, value in row.items())

    def draw(self, average: nn.Module, path: Path) -> None:
        draw_picture(_family(average).eval(), path, seed=self.config.seed, rows=self.config.sample_rows)

    def _read(self, path: str, split: str, bar: bool) -> FlowData:
        config = self.config
        assert config.flow is not None
        how: dict[str, Any] = {"size": config.img_size, "channels": config.in_channels, "cache": config.cache}
        how |= {"layout": config.layout, "values": config.values, "progress": bar}
        return load_flow_data(path, split=split, manifold=config.flow.manifold, **how)

    def _read_held_out(self, data: FlowData, bar: bool) -> FlowData | None:
        config = self.config
        path = config.data if config.eval_data is None and config.data in DEMONSTRATIONS else config.eval_data
        if path is None:
            if config.eval_every:
                raise ArgumentError("eval_data", "a path, as eval_every is given", None)
            return None
        held_out = self._read(path, "test", bar)
        if (held_out.kind, held_out.shape) != (data.kind, data.shape):
            raise ArgumentError("eval_data", f"{data.kind} of shape {data.shape}", f"{held_out.kind} {held_out.shape}")
        if config.conditional:
            held_out.check_classes(data.num_classes, data.class_names, "eval_data")
        return held_out.spread(config.eval_images)

    def _check_data(self, data: FlowData) -> None:
        """Raises ArgumentError, under the name of the option, for data that the model does not take."""
        try:
            self.model.check_data(data.values.to(self.group.device))
        except ArgumentError as error:
            raise ArgumentError("data", error.expected, error.got) from error

    @torch.no_grad()
    def _initialise(self) -> None:
        """Lets layers that set themselves by their first batch see it, the same in all processes."""
        x, y = self.batches.whole(0)
        self.model.train().loss(x, y, generator=stream(self.config.seed, "loss/first", 0, self.group.device))


def model_for(flow: FlowConfig, data: FlowData, classes: int) -> FamilyFlow:
    """Returns a new model for these data, in its preprocessing."""
    options = dict(flow.options)
    known = {field.name for field in fields(FAMILIES[flow.name].load().Options)}
    for name, value in (("vocabulary", data.vocabulary if data.kind == "tokens" else None), ("manifold", data.kind)):
        if name in known and value is not None:
            options.setdefault(name, value)
    for field in fields(FlowConfig):
        if field.name in ONLY_LEVELS and not data.levels and getattr(flow, field.name) != field.default:
            expected = f"{field.default!r}, as only 8-bit images are brought to all of space"
            raise ArgumentError(field.name, expected, getattr(flow, field.name))
    model = build(flow.name, data_shape=data.shape, num_classes=classes, **options)
    if data.kind not in ("vectors", "images"):
        return model
    noise: Any = flow.dequantization if data.levels else "none"
    wrapped = Preprocessed(model, Preprocessed.Options(noise, flow.logit, flow.alpha))
    if not data.levels:
        wrapped.standardise.fit(data.values)
    return wrapped


def _family(model: Any) -> FamilyFlow:
    assert isinstance(model, FamilyFlow)
    return model
