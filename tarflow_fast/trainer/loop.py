"""A training run is one loop over optimiser steps, between which files are written."""

from __future__ import annotations

import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..devices import own_defaults, torch_threads
from ..errors import (
    ArgumentError,
    CheckpointError,
    OutOfMemoryError,
    TarFlowError,
    TrainingDiverged,
    TrainingStopped,
)
from .config import TrainConfig
from .family import FamilyLearner
from .folder import locked
from .learner import Learner
from .metrics import MetricsLog
from .outputs import MODEL, SAMPLES
from .processes import Processes, processes
from .progress import Progress, progress_kind
from .refusals import resumes
from .start import Init
from .state import CHECKPOINT, TrainState
from .tarflow import TarFlowLearner


def train(config: TrainConfig, *, resume: bool = False, init: Init | None = None, progress: bool | str = True) -> Any:
    """Minimise E[½ |z|² − log|det dz/dx|] / (T·D) over noised images (arXiv 2412.06329, section 2).

    The run writes into config.out: `checkpoint.pt` (all that is needed to go on), `model.safetensors` (the averaged
    weights, with noise_type, noise_std and class_names), `train.csv`, `eval.csv`, `samples/*.png`, `tensorboard/`.
    A family of flows is trained by its own loss, and writes `layers.csv` too, the log-dets of its layers.
    While it runs, no other trainer can in that folder. Under torchrun all processes share each batch. SIGINT and
    SIGTERM end the run after the step under way.

    Args:
        config: The run.
        resume: Whether to go on from the checkpoint in config.out, or start again where the run was killed before its
            first one. On a CPU, with the same number of threads, the result is bit for bit that of a run that was never
            interrupted.
        init: The model to start from, or the path of its checkpoint, or None for a new model. The sizes in `config`
            that are left at their defaults are the model's.
        progress: "bar" or "lines" on standard error, "none" or False, or True for a bar on a terminal, else lines.

    Returns:
        The averaged model: a TarFlow, or a `FamilyFlow` where `config.flow` names a family.

    Raises:
        ArgumentError: An argument or option has the wrong type or range, or does not go with the data, the model, the
            folder or the checkpoint.
        BackendError: The processes of torchrun do not come together, or there is no compiler for `config.compile`.
        CheckpointError: The checkpoint is broken, or not the same for all processes.
        DataError: The data, or the metrics in the folder, cannot be read.
        OutOfMemoryError: A step does not fit in the memory of the device.
        OSError: A file cannot be written, as on a full disk.
        ProcessLost: Another process of the run is gone.
        TrainingDiverged: The loss, the gradient or the weights are not finite.
        TrainingStopped: A signal has ended the run; its checkpoint is written.

    Warns:
        TarFlowWarning: The batch size is not the usual default, or something was decided about the data.
    """
    if not isinstance(config, TrainConfig):
        raise ArgumentError("config", "a TrainConfig", type(config).__name__)
    kind = progress_kind(progress)
    if resume and init is not None:
        raise ArgumentError("init", "None, as resume is given", repr(init))
    with (
        processes(config.device) as group,
        torch_threads(config.threads),
        locked(config.out) if group.first else nullcontext(False) as killed,
    ):
        run = _Run(config, group, resume, init, kind, group.any(killed))
        try:
            return run.go()
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, TarFlowError) or not _is_out_of_memory(error):
                raise
            raise OutOfMemoryError(
                f"a step of {run.batches.size} {run.learner.kind} does not fit in the memory of {group.device}; "
                "lower batch_size, or train a smaller model"
            ) from error
        finally:
            run.forward = run.state.model  # DistributedDataParallel would keep the process group


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Gives a list to which SIGINT and SIGTERM add their number, in the main thread, as Python signals no other."""
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
    """A `_Run` is a run in one process: `go` is its loop, the other methods are its parts."""

    def __init__(
        self, config: TrainConfig, group: Processes, resume: bool, init: Init | None, progress: str, killed: bool
    ):
        self.out = Path(config.out)
        resume = resumes(self.out, resume, killed)
        kind = TarFlowLearner if config.flow is None else FamilyLearner
        bar, checkpoint = group.first and progress == "bar", self.out / CHECKPOINT if resume else None
        self.learner: Learner = kind(config, group, init, checkpoint, bar)
        learner = self.learner
        config = self.config = learner.config
        self.group, self.batches, self.steps, self.held_out = group, learner.batches, learner.steps, learner.held_out
        with own_defaults():
            sums = ("loss", *learner.figures, "grad_norm")
            self.state = TrainState(learner.model, config, sums, learner.sizes, learner.data_shape)
        if resume:
            self.state.restore(self.out / CHECKPOINT, config, learner.fingerprint)
            if self.state.step > self.steps:
                done = f"enough for the {self.state.step} steps already done"
                raise ArgumentError("epochs", done, config.epochs)
        self.state.metadata["steps"] = self.state.step

        self.forward: Callable[..., Any] = torch.compile(learner.trained) if config.compile else learner.trained
        if group.world > 1:
            ids = [group.device] if group.device.type == "cuda" else None
            with warnings.catch_warnings():
                # torch 2.10 warns of broadcast_buffers, and has no other name for it.
                warnings.simplefilter("ignore", FutureWarning)
                self.forward = DistributedDataParallel(self.forward, device_ids=ids, broadcast_buffers=False)
            total = int(group.sum(torch.tensor(self.state.step, device=group.device)))
            if total != group.world * self.state.step:
                raise CheckpointError(f"{self.out / CHECKPOINT}: not the same for all processes")
        group.wait()  # nobody writes before everybody has checked
        self.log = MetricsLog(self.out, self.state.step, config.tensorboard) if group.first else None
        if group.first and config.sample_every:
            (self.out / SAMPLES).mkdir(exist_ok=True)
        shown = progress if group.first else "none"
        self.progress = Progress(shown, self.state.step, self.steps, self.batches.size, learner.kind)
        if group.first:
            self._say_where_it_starts(resume)
            self._write_first(resume)

    def _say_where_it_starts(self, resumed: bool) -> None:
        if not self.progress.shown:
            return
        if resumed:
            self.progress.say(f"{self.out}: goes on after step {self.state.step} of {self.steps}")
        for line in self.learner.starts():
            self.progress.say(line)

    def _write_first(self, resumed: bool) -> None:
        """Writes what a run has before its first step and has to have at the end: a checkpoint and its model."""
        if not resumed:
            self._save()
        elif not self.learner.is_written(self.state.average, self.out / MODEL):
            self.learner.write(self.state.average, self.out / MODEL)

    def go(self) -> Any:
        state, config = self.state, self.config
        state.model.train()
        started = time.perf_counter() - state.seconds
        log = nullcontext() if self.log is None else closing(self.log)
        with self.progress, log, _stop_signals() as received:
            while state.step < self.steps:
                self._step()
                state.seconds = time.perf_counter() - started
                self.progress.update()
                if self._due(config.log_every):
                    self.progress.row(state.step, self._write_metrics())
                stop = self.group.any(bool(received))
                if self.group.first:
                    self._write_files(stop)
                if stop and state.step < self.steps:
                    self.group.wait()
                    raise TrainingStopped(received[0] if received else signal.SIGTERM, state.step, self.steps)
        self.group.wait()
        return state.average

    def _due(self, every: int) -> bool:
        """Returns whether this is a multiple of `every` steps, or the end."""
        return self.state.step == self.steps or (every > 0 and self.state.step % every == 0)

    def _step(self) -> None:
        """Takes one optimiser step, and adds its figures to the sums."""
        state, config = self.state, self.config
        lr = config.learning_rate(state.step, self.steps)
        for parameters in state.optimizer.param_groups:
            parameters["lr"] = lr
        outcome = self.learner.outcome(self.forward, state.step)
        state.optimizer.zero_grad()
        outcome.loss.backward()
        limit = math.inf if config.clip_norm is None else config.clip_norm
        norm = nn.utils.clip_grad_norm_(state.model.parameters(), limit)
        state.optimizer.step()
        with torch.no_grad():
            self.learner.after_step(outcome)
            state.ema.update_parameters(state.model)
            state.sums += torch.stack([outcome.loss, *outcome.figures, norm])
        state.summed += 1
        state.step += 1

    def _write_metrics(self) -> dict[str, str]:
        """Writes a row of means over the steps since the last. Returns what the progress bar shows."""
        state = self.state
        means = self._checked(self.group.mean(state.sums / state.summed))
        lr = self.config.learning_rate(state.step - 1, self.steps)
        if self.log is not None:
            row = {"epoch": self._epoch(), "lr": lr, **means, "seconds": state.seconds}
            self.log.write("train", state.step, row)
            if layers := self.learner.layers():
                self.log.write("layers", state.step, layers)
        state.sums.zero_()
        state.summed = 0
        return {"loss": f"{means['loss']:.4f}", "epoch": f"{self._epoch():.2f}"}

    def _epoch(self) -> float:
        return self.state.step / self.batches.steps_per_epoch

    def _checked(self, values: Tensor) -> dict[str, float]:
        """Returns the figures of a row by name. Raises TrainingDiverged for one that is not finite."""
        named = dict(zip(self.state.names, values.tolist(), strict=True))
        for name, value in named.items():
            if not math.isfinite(value):
                raise TrainingDiverged(f"{name} is {value} by step {self.state.step}; try a lower lr or clip_norm")
        return named

    def _write_files(self, stop: bool) -> None:
        """Writes what is due after this step. stop: whether the run ends here, so that a checkpoint is due."""
        config = self.config
        if self.held_out is not None and self._due(config.eval_every):
            self._evaluate()
        if config.sample_every and self._due(config.sample_every):
            self._sample()
        if stop or self._due(config.checkpoint_every):
            self._checked(self.state.sums)  # a broken state must not take the place of a sound one
            self._save()

    def _save(self) -> None:
        """Writes the checkpoint, of which the model can be had again, and the model."""
        if self.log is not None:
            self.log.sync()  # the checkpoint takes these rows for written
        self.state.metadata["steps"] = self.state.step
        self.state.save(self.out / CHECKPOINT, self.config, self.learner.fingerprint)
        self.learner.write(self.state.average, self.out / MODEL)

    def _evaluate(self) -> None:
        """Writes figures of held-out data under the averaged model, or says why there are none."""
        step, learner = self.state.step, self.learner
        try:
            row = learner.evaluate(self.state.average)
        except TarFlowError as error:
            self.progress.say(f"step {step}: no {learner.measure} of held-out {learner.kind}: {error}")
            return
        if self.log is not None:
            self.log.write("eval", step, {"epoch": self._epoch(), **row})
        if self.progress.shown and (line := learner.told(row)):
            self.progress.say(f"step {step}: {line}")

    def _sample(self) -> None:
        """Writes a grid of the averaged model's samples, or says why there is none."""
        step = self.state.step
        try:
            self.learner.draw(self.state.average, self.out / SAMPLES / f"step_{step:07d}.png")
        except TarFlowError as error:
            self.progress.say(f"step {step}: no grid of samples: {error}")
