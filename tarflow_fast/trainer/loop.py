"""A training run is one loop over optimiser steps, between which files are written."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..backend import check_compile
from ..checkpoints.checkpoint import load, save
from ..data import ImageData, matched, renamed
from ..devices import own_defaults
from ..errors import (
    ArgumentError,
    CheckpointError,
    OutOfMemoryError,
    TarFlowError,
    TarFlowWarning,
    TrainingDiverged,
    TrainingStopped,
)
from ..evaluation import Noise, bits_per_dim
from ..images import save_grid
from ..models.config import TarFlowConfig
from ..models.tarflow import TarFlow
from ..sampling.sampler import Sampler
from .batches import Batches
from .config import DEFAULT_BATCH, NETWORK, TrainConfig
from .folder import locked
from .limits import check_fits
from .metrics import MetricsLog
from .processes import Processes, processes
from .progress import Progress, progress_kind
from .shared import load_once
from .start import Init, Start, given_options, read_init, sizes_of, with_classes_of
from .state import CHECKPOINT, SUMS, TrainState, begun_with

MODEL = "model.safetensors"
OURS = (CHECKPOINT, MODEL, "train.csv", "eval.csv")
UNCONDITIONAL_COLUMNS = 8
MOST_STEPS = 10**10  # at a thousandth of a second each they take months
MOST_PIXELS = 10**9  # a grid of samples has no more


def train(
    config: TrainConfig, *, resume: bool = False, init: Init | None = None, progress: bool | str = True
) -> TarFlow:
    """Minimise E[½ |z|² − log|det dz/dx|] / (T·D) over noised images (arXiv 2412.06329, section 2).

    The run writes into config.out: `checkpoint.pt` (all that is needed to go on), `model.safetensors` (the averaged
    weights, with noise_type, noise_std and class_names), `train.csv`, `eval.csv`, `samples/*.png`, `tensorboard/`.
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
        The averaged model.

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
        _threads(config.threads),
        locked(config.out) if group.first else nullcontext(False) as killed,
    ):
        run = _Run(config, group, resume, init, kind, group.any(killed))
        try:
            return run.go()
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, TarFlowError) or not _is_out_of_memory(error):
                raise
            raise OutOfMemoryError(
                f"a step of {run.batches.size} images does not fit in the memory of {group.device}; "
                "lower batch_size, or train a smaller model"
            ) from error
        finally:
            run.forward = run.state.model  # DistributedDataParallel would keep the process group


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """Makes torch compute with so many threads while the block runs; None leaves their number as it is."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def model_config(config: TrainConfig, data: ImageData) -> TarFlowConfig:
    """Returns the sizes of the model that learns these data."""
    network: dict[str, Any] = {name: getattr(config, name) for name in NETWORK}
    network["num_classes"] = data.num_classes if config.conditional else 0
    if data.sequences:
        return TarFlowConfig.for_tokens(*data.images.shape[1:], **network)
    channels, height, width = data.images.shape[1:]
    return TarFlowConfig(channels, (height, width), config.patch_size, **network)


def run_metadata(config: TrainConfig, data: ImageData) -> dict[str, Any]:
    """Returns what the model's file records besides weights."""
    metadata: dict[str, Any] = {"noise_type": config.noise_type}
    if config.noise_type == "gaussian":
        metadata["noise_std"] = config.noise_std
    if data.images.is_floating_point():
        metadata["values"] = "raw"
    if config.conditional and data.names:
        metadata["class_names"] = list(data.names)
    return metadata


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
        resume = self._resumes(resume, killed)
        start = None if init is None else read_init(init, given_options(config))
        source = None if start is None else start.model
        if source is not None:
            config = replace(config, **sizes_of(source, given_options(config)))
        self.config, self.group = config, group
        self.bar = group.first and progress == "bar"  # whether one shows while data is read
        self._check_options(math.ceil((config.batch_size or 1) / group.world), source)

        own = self._named(lambda: self._load(config.data, "train"))
        if own.sequences:
            config.check_for_sequences()
        data = own if config.class_names is None else renamed(own, config.class_names)
        begun = begun_with(self.out / CHECKPOINT) if resume else None
        if source is not None:
            begun = source.config, source.metadata.get("class_names")
        if begun is not None:
            data = with_classes_of(begun[0].num_classes, begun[1], data)
            own = own if own.numbers is None else replace(data, class_names=None)  # the numbers are the model's labels
        sizes = model_config(config, data) if begun is None else begun[0]
        if tuple(data.images.shape[1:]) != sizes.data_shape:
            raise ArgumentError("init", f"a model of images of shape {tuple(data.images.shape[1:])}", sizes.data_shape)
        config = self.config = self._with_batch_size(len(data))
        self.batches = Batches(data, config, group.device, group.rank, group.world)
        check_fits(sizes, self.batches.size // group.world, group.device)
        self.steps = config.epochs * self.batches.steps_per_epoch
        if self.steps > MOST_STEPS:
            most = MOST_STEPS // self.batches.steps_per_epoch
            raise ArgumentError("epochs", f"at most {most}, which are {MOST_STEPS:,} steps", config.epochs)
        self.held_out = self._named(lambda: self._load_held_out(data, own))
        self._check_grid(sizes)
        with own_defaults():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                model = TarFlow.from_config(sizes).to(group.device)
            if source is not None:
                model.load_state_dict(source.state_dict())
            self.state = TrainState(model, config)
        self.fingerprint = data.fingerprint
        self.state.average.metadata = run_metadata(config, data) | ({} if start is None else {"init": start.name})
        if resume:
            self.state.restore(self.out / CHECKPOINT, config, self.fingerprint)
            if self.state.step > self.steps:
                done = f"enough for the {self.state.step} steps already done"
                raise ArgumentError("epochs", done, config.epochs)
        self.state.average.metadata["steps"] = self.state.step

        self.forward: Callable[..., Any] = torch.compile(model) if config.compile else model
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
            self._samples.mkdir(exist_ok=True)
        self.progress = Progress(progress if group.first else "none", self.state.step, self.steps, self.batches.size)
        if group.first:
            self._say_where_it_starts(resume, start)
            self._write_first(resume)

    @property
    def _samples(self) -> Path:
        return self.out / "samples"

    def _resumes(self, resume: bool, killed: bool) -> bool:
        """Returns whether the run goes on from a checkpoint. Raises ArgumentError for a folder that it cannot have."""
        if resume and (self.out / CHECKPOINT).is_file():
            return True
        if resume and not killed:
            raise ArgumentError("resume", f"a checkpoint {self.out / CHECKPOINT}", "none")
        for name in OURS:
            if os.path.lexists(self.out / name):
                without = (
                    "a checkpoint, or resume=True" if name == CHECKPOINT else f"{name}, which the run would replace"
                )
                raise ArgumentError("out", f"a folder without {without}", repr(str(self.out)))
        return False

    def _with_batch_size(self, images: int) -> TrainConfig:
        """Returns the configuration with its batch size, which a warning tells where it is not the usual default."""
        config, world = self.config, self.group.world
        size = config.batch_size_for(images, world)
        if config.batch_size is None and size != DEFAULT_BATCH and self.group.first:
            among = f" and {world} processes" if world > 1 else ""
            said = f"for {images} images{among} batch_size={size} is taken, not {DEFAULT_BATCH}"
            warnings.warn(said, TarFlowWarning, stacklevel=4)
        return replace(config, batch_size=size)

    def _check_options(self, rows: int, source: TarFlow | None) -> None:
        """Raises an error for options that cannot be, as far as that can be told before data is read."""
        config = self.config
        check_compile(config.compile, self.group.device)
        if config.eval_data is not None and not os.path.exists(config.eval_data):
            raise ArgumentError("eval_data", "a file or folder that is there", repr(config.eval_data))
        if config.sample_guidance and not config.conditional:
            raise ArgumentError("sample_guidance", "0, as the model is unconditional", config.sample_guidance)
        if os.path.lexists(self._samples) and not self._samples.is_dir() and config.sample_every:
            raise ArgumentError("out", "a folder whose samples is a folder", repr(config.out))
        if source is not None:
            check_fits(source.config, rows, self.group.device)
        elif config.img_size is not None:
            sizes = {name: getattr(config, name) for name in ("in_channels", "img_size", "patch_size", *NETWORK)}
            check_fits(TarFlowConfig(**sizes), rows, self.group.device)

    def _check_grid(self, sizes: TarFlowConfig) -> None:
        if not self.config.sample_every:
            return
        if sizes.in_channels not in (1, 3):
            raise ArgumentError(
                "sample_every", f"0, as {sizes.in_channels} channels make no picture", self.config.sample_every
            )
        row = (sizes.num_classes or UNCONDITIONAL_COLUMNS) * math.prod(sizes.image_size)
        if row * self.config.sample_rows > MOST_PIXELS:
            most = f"at most {MOST_PIXELS // row} (a picture of {MOST_PIXELS:,} pixels)"
            raise ArgumentError("sample_rows", most, self.config.sample_rows)

    @staticmethod
    def _named(read: Callable[[], Any]) -> Any:
        """Returns what `read` returns; its errors have the names of the run's options."""
        try:
            return read()
        except ArgumentError as error:
            if error.argument == "size":
                raise ArgumentError("img_size", error.expected, error.got) from error
            raise

    def _say_where_it_starts(self, resumed: bool, start: Start | None) -> None:
        if not self.progress.shown:
            return
        if resumed:
            self.progress.say(f"{self.out}: goes on after step {self.state.step} of {self.steps}")
        if start is not None:
            for key, now in self.state.average.metadata.items():
                before = start.model.metadata.get(key, now)
                if key.startswith("noise") and before != now:
                    self.progress.say(f"{start.name} was trained with {key} {before!r}; this run has {now!r}")

    def _write_first(self, resumed: bool) -> None:
        """Writes what a run has before its first step and has to have at the end: a checkpoint and its model."""
        if not resumed:
            self._save()
        elif not self._model_is_written():
            self._save_model()

    def _model_is_written(self) -> bool:
        """Returns whether the model's file has the model of the checkpoint: a run may be killed between the two."""
        try:
            found, model = load(self.out / MODEL), self.state.average
        except (TarFlowError, OSError):
            return False
        weights = model.state_dict()
        same = all(torch.equal(value, weights[key].cpu()) for key, value in found.state_dict().items())
        return same and (found.config, found.metadata) == (model.config, model.metadata)

    def _load(self, path: str, split: str) -> ImageData:
        config = self.config
        return load_once(
            self.group,
            path,
            cache=config.cache,
            split=split,
            size=config.img_size,
            channels=config.in_channels,
            layout=config.layout,
            values=config.values,
            progress=self.bar,
        )

    def _load_held_out(self, data: ImageData, own: ImageData) -> ImageData | None:
        """Returns the held-out images with the model's labels, or None. own: the data with its own class names."""
        if self.config.eval_data is None:
            return None
        held_out = self._load(self.config.eval_data, "test")
        wanted, got = tuple(data.images.shape[1:]), tuple(held_out.images.shape[1:])
        if got != wanted:
            raise ArgumentError("eval_data", f"images of shape {wanted}", got)
        if held_out.images.dtype != data.images.dtype:
            raise ArgumentError("eval_data", f"images of {data.images.dtype}", held_out.images.dtype)
        if self.config.conditional:
            if held_out.labels is None:
                raise ArgumentError("eval_data", f"labels of {data.num_classes} classes", "none")
            held_out = matched(held_out, data.names, data.num_classes, "eval_data", own.names or ())
        return held_out.spread(self.config.eval_images)

    def go(self) -> TarFlow:
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
        """Updates the prior of a volume-preserving model by the z of all processes."""
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
        """Returns the figures of a row by name. Raises TrainingDiverged for one that is not finite."""
        named = dict(zip(SUMS, values.tolist(), strict=True))
        for name, value in named.items():
            if not math.isfinite(value):
                raise TrainingDiverged(f"{name} is {value} by step {self.state.step}; try a lower lr or clip_norm")
        return named

    def _write_files(self, stop: bool) -> None:
        """Writes what is due after this step. stop: whether the run ends here, so that a checkpoint is due."""
        config = self.config
        if self.held_out is not None and self._due(config.eval_every):
            self._evaluate(self.held_out)
        if config.sample_every and self._due(config.sample_every):
            self._sample()
        if stop or self._due(config.checkpoint_every):
            self._checked(self.state.sums)  # a broken state must not take the place of a sound one
            self._save()

    def _save(self) -> None:
        """Writes the checkpoint, of which the model can be had again, and the model."""
        if self.log is not None:
            self.log.sync()  # the checkpoint takes these rows for written
        self.state.average.metadata["steps"] = self.state.step
        self.state.save(self.out / CHECKPOINT, self.config, self.fingerprint)
        self._save_model()

    def _save_model(self) -> None:
        save(self.state.average, self.out / MODEL)
        with (self.out / MODEL).open("rb+") as file:
            os.fsync(file.fileno())

    def _evaluate(self, held_out: ImageData) -> None:
        """Writes bits/dim of held-out images under the averaged model, in fp32, by the same noise at every call."""
        model = self.state.average
        noise = Noise.of(model, seed=self.config.seed)
        try:
            found = bits_per_dim(model, held_out, noise=noise)
        except TarFlowError as error:  # early on a density may be infinite or NaN
            self.progress.say(f"step {self.state.step}: no bits/dim of held-out images: {error}")
            return
        if self.log is not None:
            self.log.write("eval", self.state.step, {"epoch": self._epoch(), "bits_per_dim": found.mean})

    def _sample(self) -> None:
        """Writes a grid of the averaged model's samples, a class a column, from the same noise at every call."""
        model, config = self.state.average, self.config
        classes = model.config.num_classes
        columns = classes or UNCONDITIONAL_COLUMNS
        path = self._samples / f"step_{self.state.step:07d}.png"
        try:
            samples = Sampler(model, solver="sequential", probe="never").sample(
                columns * config.sample_rows,
                list(range(classes)) if classes else None,
                seed=config.seed,
                guidance=config.sample_guidance if classes else 0.0,  # guidance is towards a class
                denoise=config.noise_type == "gaussian",
                on_nonfinite="redraw",
            )
            save_grid(samples.images, path, columns)
        except TarFlowError as error:  # early on images may not be finite; they may be too many for the memory
            self.progress.say(f"step {self.state.step}: no grid of samples: {error}")
