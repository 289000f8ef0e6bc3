"""A run that was ended goes on as if it had not been."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import (
    Killed,
    assert_same_run,
    checkpoint,
    command,
    flags,
    kill,
    one_thread,
    rows,
    stop_at,
    tiny,
)

from tarflow_fast.data import load_images
from tarflow_fast.errors import ArgumentError, CheckpointError, TrainingStopped
from tarflow_fast.trainer import train

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "bfloat16", "noise_type": "uniform", "flip": True},
        {"nvp": False, "clip_norm": None},
        {"conditional": False},
    ],
    ids=["plain", "bf16", "vp", "unconditional"],
)
def test_killed_and_resumed_is_uninterrupted(
    pictures: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Killed in the middle of an epoch, after rows of metrics that the last checkpoint does not know."""
    changes = {**changes, "eval_data": pictures, "eval_every": 3, "eval_images": 10}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(tiny(pictures, whole, **changes), progress=False)
    config = tiny(pictures, parts, checkpoint_every=5, **changes)
    with monkeypatch.context() as patch:
        stop_at(patch, 9, kill)
        with pytest.raises(Killed):
            train(config, progress=False)
    assert checkpoint(parts)["step"] == 5
    assert rows(parts)[-1]["step"] == 8
    train(config, resume=True, progress=False)
    assert_same_run(whole, parts)
    train(config, resume=True, progress=False)  # there is nothing left to do
    assert_same_run(whole, parts)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_stop(
    pictures: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(tiny(pictures, whole), progress=False)
    with monkeypatch.context() as patch:
        stop_at(patch, 7, lambda: os.kill(os.getpid(), number))
        with pytest.raises(TrainingStopped, match=f"{number.name} after step 7 of 12") as stopped:
            train(tiny(pictures, parts), progress=False)
    assert stopped.value.signal == number
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert checkpoint(parts)["step"] == 7
    train(tiny(pictures, parts), resume=True, progress=False)
    assert_same_run(whole, parts)


@pytest.mark.slow
def test_killed_process_resumes(pictures: str, tmp_path: Path) -> None:
    """SIGKILL at any moment after the first checkpoint, in the middle of writing one too."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(tiny(pictures, whole, epochs=20), progress=False)
    config = tiny(pictures, parts, epochs=20, checkpoint_every=1)
    process = subprocess.Popen(command("train", *flags(config), "--quiet", "--threads", "1"), env=one_thread())
    while process.poll() is None:
        if (parts / "checkpoint.pt").exists() and checkpoint(parts)["step"] > 5:
            break
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 5 < checkpoint(parts)["step"] < 80
    train(config, resume=True, progress=False)
    assert_same_run(whole, parts)


def test_more_epochs(pictures: str, tmp_path: Path) -> None:
    """A finished run goes on under the schedule of the new number of epochs; fewer than done is an error."""
    out = tmp_path / "run"
    train(tiny(pictures, out), progress=False)
    train(tiny(pictures, out, epochs=4), resume=True, progress=False)
    found = rows(out)
    assert [row["step"] for row in found] == list(range(2, 17, 2))
    longer = tiny(pictures, out, epochs=4)
    assert found[-1]["lr"] == pytest.approx(longer.learning_rate(15, 16))
    with pytest.raises(ArgumentError, match="epochs: expected enough for the 16 steps"):
        train(tiny(pictures, out, epochs=3), resume=True, progress=False)


def test_other_runs_are_not_continued(pictures: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(ArgumentError, match="resume: expected a checkpoint"):
        train(tiny(pictures, out), resume=True, progress=False)
    train(tiny(pictures, out, epochs=1), progress=False)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ArgumentError, match="out: expected a folder without a checkpoint"):
        train(tiny(pictures, out, epochs=1), progress=False)
    for change in ({"seed": 1}, {"lr": 1e-3}, {"channels": 128}, {"dtype": "bfloat16"}, {"flip": True}):
        with pytest.raises(ArgumentError, match=f"{next(iter(change))}: expected .*, as in the run"):
            train(tiny(pictures, out, **change), resume=True, progress=False)
    others = tmp_path / "others.npz"
    data = load_images(pictures)
    np.savez(others, images=255 - data.images[:, 0].numpy(), labels=data.labels, class_names=data.class_names)
    with pytest.raises(ArgumentError, match="data: expected the images of the run"):
        train(tiny(str(others), out), resume=True, progress=False)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("kept", [0, 100, -1000])
def test_broken_checkpoints(pictures: str, tmp_path: Path, kept: int) -> None:
    out = tmp_path / "run"
    train(tiny(pictures, out, epochs=1), progress=False)
    path = out / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="not a whole training checkpoint"):
        train(tiny(pictures, out, epochs=1), resume=True, progress=False)


def test_foreign_checkpoint(pictures: str, tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="not a training checkpoint of format 1"):
        train(tiny(pictures, tmp_path), resume=True, progress=False)
