"""The training run: one loop over optimiser steps, and what happens between them."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ..checkpoint import save
from ..config import TarFlowConfig
from ..data import ImageData, load_images
from ..devices import own_defaults
from ..errors import ArgumentError, TrainingDiverged, TrainingStopped
from ..evaluate import Noise, bits_per_dim
from ..images import save_grid
from ..model import TarFlow
from ..sampler import Sampler
from .batches import Batches
from .config import TrainConfig
from .metrics import MetricsLog
from .processes import Processes, processes
from .state import SUMS, TrainState

CHECKPOINT, MODEL = "checkpoint.pt", "model.safetensors"
UNCONDITIONAL_COLUMNS = 8


def train(config: TrainConfig, *, resume: bool = False, progress: bool = True) -> TarFlow:
    """Minimise E[½ |z|² − log|det dz/dx|] / (T·D) over noised images (arXiv 2412.06329, section 2).

    Writes into config.out: `checkpoint.pt` (all that is needed to go on), `model.safetensors` (the
    averaged weights, with noise_type, noise_std and class_names), `train.csv`, `eval.csv`,
    `samples/*.png`, `tensorboard/`. resume: go on from the checkpoint there; on a CPU, with the same
    number of threads, the result is bit for bit that of a run that was never interrupted. progress: a bar
    on standard error. Under torchrun all processes share each batch. SIGINT and SIGTERM end the run after
    the step under way.

    Returns the averaged model. Raises ArgumentError, DataError, CheckpointError, TrainingStopped (by a
    signal), TrainingDiverged.
    """
    with processes(config.device) as group:
        return _Run(config, group, resume, progress).go()


def model_config(config: TrainConfig, data: ImageData) -> TarFlowConfig:
    """The sizes of the model that learns these images."""
    return TarFlowConfig(
        in_channels=data.images.shape[1],
        img_size=data.images.shape[-1],
        patch_size=config.patch_size,
        channels=config.channels,
        num_blocks=config.num_blocks,
        layers_per_block=config.layers_per_block,
        nvp=config.nvp,
        num_classes=data.num_classes if config.conditional else 0,
        head_dim=config.head_dim,
    )


def run_metadata(config: TrainConfig, data: ImageData) -> dict[str, Any]:
    """What the model's file records besides weights."""
    metadata: dict[str, Any] = {"noise_type": config.noise_type}
    if config.noise_type == "gaussian":
        metadata["noise_std"] = config.noise_std
    if config.conditional and data.class_names:
        metadata["class_names"] = list(data.class_names)
    return metadata


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list to which SIGINT and SIGTERM add their number. Python gives signals to the main thread alone."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda n, _: received.append(n)) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


class _Run:
    """A run in one process: `go` is its loop, the other methods what the loop does."""

    def __init__(self, config: TrainConfig, group: Processes, resume: bool, progress: bool):
        self.config, self.group = config, group
        self.progress = progress and group.first
        self.out = Path(config.out)
        if not resume and (self.out / CHECKPOINT).exists():
            raise ArgumentError("out", "a folder without a checkpoint, or resume", repr(config.out))
        if resume and not (self.out / CHECKPOINT).is_file():
            raise ArgumentError("resume", f"a checkpoint {self.out / CHECKPOINT}", "none")

        data = self._load(config.data, "train")
        self.batches = Batches(data, config, group.device, group.rank, group.world)
        self.steps = config.epochs * self.batches.steps_per_epoch
        self.held_out = self._load_held_out(data)
        with own_defaults():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                model = TarFlow.from_config(model_config(config, data)).to(group.device)
            self.state = TrainState(model, config)
        self.fingerprint = data.fingerprint
        if resume:
            self.state.restore(self.out / CHECKPOINT, config, self.fingerprint)
            if self.state.step > self.steps:
                done = f"enough for the {self.state.step} steps already done"
                raise ArgumentError("epochs", done, config.epochs)
        self.state.average.metadata = {**run_metadata(config, data), "steps": self.state.step}

        self.forward: Callable[..., Any] = torch.compile(model) if config.compile else model
        if group.world > 1:
            ids = [group.device] if group.device.type == "cuda" else None
            self.forward = DistributedDataParallel(self.forward, device_ids=ids, broadcast_buffers=False)
        group.wait()  # nobody writes before everybody has checked
        self.out.mkdir(parents=True, exist_ok=True)
        self.log = MetricsLog(self.out, self.state.step, config.tensorboard) if group.first else None

    def _load(self, path: str, split: str) -> ImageData:
        data = load_images(path, split=split, size=self.config.img_size, channels=self.config.in_channels)
        names = self.config.class_names
        return data if names is None else replace(data, class_names=names)

    def _load_held_out(self, data: ImageData) -> ImageData | None:
        if self.config.eval_data is None:
            return None
        held_out = self._load(self.config.eval_data, "test")
        wanted, got = tuple(data.images.shape[1:]), tuple(held_out.images.shape[1:])
        if got != wanted:
            raise ArgumentError("eval_data", f"images of shape {wanted}", got)
        if self.config.conditional and not 0 < held_out.num_classes <= data.num_classes:
            raise ArgumentError("eval_data", f"labels of {data.num_classes} classes", held_out.num_classes)
        return held_out.spread(self.config.eval_images)

    def go(self) -> TarFlow:
        state, config = self.state, self.config
        bar = tqdm(total=self.steps, initial=state.step, disable=not self.progress, unit="step", dynamic_ncols=True)
        state.model.train()
        started = time.perf_counter() - state.seconds
        log = nullcontext() if self.log is None else closing(self.log)
        with bar, log, _stop_signals() as received:
            while state.step < self.steps:
                self._step()
                state.seconds = time.perf_counter() - started
                bar.update()
                if self._due(config.log_every):
                    bar.set_postfix(self._write_metrics())
                stop = self.group.any(bool(received))
                if self.group.first:
                    self._write_files(stop)
                if stop and state.step < self.steps:
                    self.group.wait()
                    raise TrainingStopped(received[0] if received else signal.SIGTERM, state.step, self.steps)
        self.group.wait()
        return state.average

    def _due(self, every: int) -> bool:
        """At the multiples of `every` steps, and at the end."""
        return self.state.step == self.steps or (every > 0 and self.state.step % every == 0)

    def _step(self) -> None:
        """One optimiser step; adds its figures to the sums."""
        state, config, kind = self.state, self.config, self.group.device.type
        lr = config.learning_rate(state.step, self.steps)
        for parameters in state.optimizer.param_groups:
            parameters["lr"] = lr
        x, y = self.batches(state.step)
        with torch.autocast(kind, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            z, _, log_det = self.forward(x, y)
        loss = state.model.get_loss(z, log_det)
        state.optimizer.zero_grad()
        loss.backward()
        limit = math.inf if config.clip_norm is None else config.clip_norm
        norm = nn.utils.clip_grad_norm_(state.model.parameters(), limit)
        state.optimizer.step()
        with torch.no_grad():
            if not config.nvp:
                self._update_prior(z)
            state.ema.update_parameters(state.model)
            state.sums += torch.stack([loss, 0.5 * z.square().mean(), log_det.mean(), norm])
        state.summed += 1
        state.step += 1

    def _update_prior(self, z: Tensor) -> None:
        """The model's own update, by the z of all processes."""
        if self.group.world > 1:
            z = self.group.mean(z.square().mean(0, keepdim=True)).sqrt()
        self.state.model.update_prior(z)

    def _write_metrics(self) -> dict[str, str]:
        """Writes a row of means over the steps since the last. Returns what the progress bar shows."""
        state = self.state
        means = self._checked(self.group.mean(state.sums / state.summed))
        lr = self.config.learning_rate(state.step - 1, self.steps)
        if self.log is not None:
            row = {"epoch": self._epoch(), "lr": lr, **means, "seconds": state.seconds}
            self.log.write("train", state.step, row)
        state.sums.zero_()
        state.summed = 0
        return {"loss": f"{means['loss']:.4f}", "epoch": f"{self._epoch():.2f}"}

    def _epoch(self) -> float:
        return self.state.step / self.batches.steps_per_epoch

    def _checked(self, values: Tensor) -> dict[str, float]:
        """The figures of a row by name. Raises TrainingDiverged."""
        named = dict(zip(SUMS, values.tolist(), strict=True))
        for name, value in named.items():
            if not math.isfinite(value):
                raise TrainingDiverged(f"{name} is {value} by step {self.state.step}; try a lower lr or clip_norm")
        return named

    def _write_files(self, stop: bool) -> None:
        """What is due after this step. stop: the run ends here, so that a checkpoint is."""
        config = self.config
        if self.held_out is not None and self._due(config.eval_every):
            self._evaluate(self.held_out)
        if config.sample_every and self._due(config.sample_every):
            self._sample()
        if stop or self._due(config.checkpoint_every):
            self._checked(self.state.sums)  # a broken state must not take the place of a sound one
            self.state.save(self.out / CHECKPOINT, config, self.fingerprint)
            self.state.average.metadata["steps"] = self.state.step
            save(self.state.average, self.out / MODEL)

    def _evaluate(self, held_out: ImageData) -> None:
        """bits/dim of held-out images under the averaged model, in fp32, by the same noise at every call."""
        model = self.state.average
        labels = held_out.labels if self.config.conditional else None
        noise = Noise.of(model, seed=self.config.seed)
        found = bits_per_dim(model, held_out.images, labels, noise=noise)
        if self.log is not None:
            self.log.write("eval", self.state.step, {"epoch": self._epoch(), "bits_per_dim": found.mean})

    def _sample(self) -> None:
        """A grid of the averaged model's samples, a class a column, from the same noise at every call."""
        model, config = self.state.average, self.config
        classes = model.config.num_classes
        columns = classes or UNCONDITIONAL_COLUMNS
        samples = Sampler(model, solver="sequential").sample(
            columns * config.sample_rows,
            list(range(classes)) if classes else None,
            seed=config.seed,
            guidance=config.sample_guidance,
            denoise=config.noise_type == "gaussian",
        )
        folder = self.out / "samples"
        folder.mkdir(exist_ok=True)
        save_grid(samples.images, folder / f"step_{self.state.step:07d}.png", columns)
