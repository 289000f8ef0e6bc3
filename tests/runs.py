"""This module has small training runs for tests: data, configuration, what they leave, and processes to be killed
in."""

from __future__ import annotations

import csv
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import tarflow_fast as tff
from tarflow_fast.trainer import TrainConfig
from tarflow_fast.trainer.loop import _Run

IMAGES, CLASSES, STEPS = 70, 3, 12  # 70 images in batches of 16 for 3 epochs


def write_pictures(path: Path) -> str:
    rng = np.random.default_rng(1)
    np.savez(
        path,
        images=rng.integers(0, 256, (IMAGES, 8, 8), dtype=np.uint8),
        labels=np.arange(IMAGES) % CLASSES,
        class_names=np.array(["cat", "dog", "owl"]),
    )
    return str(path)


def tiny(data: str, out: Path, **changes: Any) -> TrainConfig:
    """Returns the configuration of 12 steps of a model of two blocks with 16 tokens each."""
    sizes: dict[str, Any] = {"patch_size": 2, "channels": 64, "num_blocks": 2, "layers_per_block": 1}
    schedule: dict[str, Any] = {"epochs": 3, "batch_size": 16, "lr": 3e-3, "warmup_steps": 4, "log_every": 2}
    machine: dict[str, Any] = {"dtype": "float32", "device": "cpu"}
    return TrainConfig(data, str(out), **{**sizes, **schedule, **machine, **changes})


def checkpoint(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(out / "checkpoint.pt", weights_only=True)
    return content


def assert_same(a: Any, b: Any, where: str = "", **tolerance: float) -> None:
    """Asserts that nested containers have equal tensors: bit for bit, or within a tolerance."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}", **tolerance)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{i}", **tolerance)
    elif isinstance(a, Tensor):
        if tolerance:
            torch.testing.assert_close(a, b, **tolerance, msg=lambda m: f"{where}: {m}")
        else:
            assert torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_run(a: Path, b: Path) -> None:
    """Asserts that checkpoints, models and metrics of two runs agree in all but the clock."""
    one, two = checkpoint(a), checkpoint(b)
    for content in (one, two):
        del content["seconds"], content["config"]["out"], content["config"]["checkpoint_every"]
    assert_same(one, two)
    models = [tff.load(out / "model.safetensors") for out in (a, b)]
    assert_same(*(dict(model.state_dict()) for model in models))
    assert_same(*(model.metadata for model in models))
    for name in ("train", "eval"):
        assert [{**row, "seconds": 0} for row in rows(a, name)] == [{**row, "seconds": 0} for row in rows(b, name)]


def rows(out: Path, name: str = "train") -> list[dict[str, float]]:
    path = out / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tarflow_fast", *arguments]


def flags(config: TrainConfig) -> list[str]:
    """Returns the configuration as options of `tarflow-fast train`."""
    renamed = {"num_blocks": "blocks", "layers_per_block": "layers"}
    out = []
    for field in fields(config):
        value = getattr(config, field.name)
        flag = "--" + renamed.get(field.name, field.name).replace("_", "-")
        if isinstance(value, bool):
            if value != field.default:
                out.append({"--nvp": "--vp", "--conditional": "--unconditional"}.get(flag, flag))
        elif value is not None:
            out += [flag, ",".join(value) if isinstance(value, tuple) else str(value)]
    return out


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class Child:
    """A child is a forked process, what it writes on both streams, and its exit code."""

    def __init__(self, pid: int, stream: int):
        self.pid, self._stream, self.text = pid, stream, ""
        self.code: int | None = None

    def ended(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._end(status)
        return self.code is not None

    def wait(self, seconds: float = 60) -> int:
        """Returns the exit code; a process that takes longer is killed, and its code is that of SIGKILL."""
        end = time.monotonic() + seconds
        while not self.ended() and time.monotonic() < end:
            time.sleep(0.002)
        self.kill()
        assert self.code is not None
        return self.code

    def kill(self) -> None:
        """Sends SIGKILL, if it is not over yet."""
        if not self.ended():
            os.kill(self.pid, signal.SIGKILL)
            self._end(os.waitpid(self.pid, 0)[1])

    def _end(self, status: int) -> None:
        self.code = os.waitstatus_to_exitcode(status)
        with open(self._stream, errors="replace") as stream:
            # but for what gloo of some versions of torch prints at every start
            self.text = "".join(line for line in stream if not line.startswith("[Gloo] Rank"))


def fork(action: Callable[[], object], environment: dict[str, str] | None = None) -> Child:
    """Runs the action in a copy of this process, which need not import torch again. It may write a pipe full."""
    stream, target = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a fork beside threads, of which the child uses none
        pid = os.fork()
    if pid:
        os.close(target)
        return Child(pid, stream)
    code = 70
    try:
        os.close(stream)
        os.dup2(target, 1)
        os.dup2(target, 2)
        os.close(target)
        with open(1, "w", buffering=1, closefd=False) as out, open(2, "w", buffering=1, closefd=False) as err:
            sys.stdout, sys.stderr = out, err
            os.environ.update(environment or {})
            warnings.simplefilter("default")  # as for a user, whom they do not stop
            tqdm.set_lock(threading.RLock())  # not one that forked processes share, and whoever is killed keeps
            try:
                action()
                code = 0
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 1
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(code)


def train_command(*arguments: str) -> Callable[[], object]:
    """Returns `tarflow-fast train …` for `fork`."""
    from tarflow_fast.cli import main  # here, so that not each child has to import it

    return lambda: main(["train", *arguments])


def limit_files(size: int, action: Callable[[], object]) -> Callable[[], object]:
    """Returns the action where no file can be larger than so many bytes."""

    import resource  # POSIX

    def act() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        action()

    return act


def pixels(folder: Path) -> dict[str, bytes]:
    """Returns the pictures in a folder."""
    out = {}
    for path in sorted(folder.iterdir()):
        with Image.open(path) as picture:
            out[path.name] = picture.tobytes()
    return out


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, action: Any) -> None:
    """Calls `action` when so many steps are done."""
    plain = _Run._step

    def stepped(run: _Run) -> None:
        plain(run)
        if run.state.step == step:
            action()

    monkeypatch.setattr(_Run, "_step", stepped)


class Killed(BaseException):
    pass


def kill() -> None:
    raise Killed


def config_for_batches(**changes: Any) -> TrainConfig:
    return TrainConfig("-", "-", **{"batch_size": 8, "noise_std": 1e-4, "drop_label": 0.0, **changes})
