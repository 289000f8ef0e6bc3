"""What a run is: its schedule, its configuration, and the command that gives them."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from runs import (
    assert_same_run,
    checkpoint,
    config_for_batches,
    flags,
    stop_at,
    tiny,
)

from tarflow_fast.cli import main
from tarflow_fast.errors import ArgumentError
from tarflow_fast.trainer import TrainConfig, train

CPU = torch.device("cpu")


def test_learning_rate() -> None:
    config = config_for_batches(lr=1.0, min_lr=0.1, warmup_steps=10)
    rates = [config.learning_rate(step, 110) for step in range(110)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)  # half way down
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 0.99)) / 2)
    assert config.learning_rate(110, 110) == pytest.approx(0.1)
    assert config_for_batches(warmup_steps=0, lr=1.0).learning_rate(0, 1) == 1.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data", ""),
        ("out", None),
        ("eval_data", 3),
        ("patch_size", 0),
        ("channels", 64.0),
        ("epochs", True),
        ("batch_size", -1),
        ("warmup_steps", -1),
        ("seed", -1),
        ("img_size", 0),
        ("in_channels", 2),
        ("nvp", 2),
        ("class_names", ["a"]),
        ("class_names", ()),
        ("class_names", ("a", "")),
        ("noise_type", "laplace"),
        ("noise_std", 0.0),
        ("drop_label", 1.1),
        ("lr", 0.0),
        ("lr", math.nan),
        ("min_lr", 1.0),
        ("weight_decay", -1e-4),
        ("clip_norm", 0.0),
        ("ema_decay", 1.0),
        ("dtype", "float16"),
        ("device", 0),
        ("eval_every", 10),
        ("sample_guidance", -1.0),
    ],
)
def test_bad_configurations(field: str, value: object) -> None:
    with pytest.raises(ArgumentError, match="eval_data" if field == "eval_every" else field):
        TrainConfig(**{"data": "d", "out": "o", field: value})  # type: ignore[arg-type]


def test_names_need_classes() -> None:
    with pytest.raises(ArgumentError, match="class_names"):
        TrainConfig("d", "o", conditional=False, class_names=("a",))


def test_command_has_the_defaults_of_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr("tarflow_fast.trainer.train", lambda config, **how: called.append((config, how)))
    monkeypatch.setattr("tarflow_fast.cli.train.keep_freed_memory", lambda: None)
    done = CliRunner().invoke(main, ["train", "--data", "d", "--out", "o"])
    assert done.exit_code == 0, done.output
    assert called == [(TrainConfig("d", "o"), {"resume": False, "progress": True})]


def test_command(pictures: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tarflow_fast.cli.train.keep_freed_memory", lambda: None)
    config = tiny(pictures, tmp_path / "a", nvp=False, clip_norm=2.0, class_names=("x", "y", "z"), flip=True)
    done = CliRunner().invoke(main, ["train", *flags(config)])
    assert done.exit_code == 0, done.output
    assert done.stdout.split() == [str(tmp_path / "a" / "model.safetensors")]
    train(replace(config, out=str(tmp_path / "b")), progress=False)
    assert_same_run(tmp_path / "a", tmp_path / "b")

    again = CliRunner().invoke(main, ["train", *flags(config)])
    assert again.exit_code == 1
    assert "a folder without a checkpoint, or --resume, got" in again.output
    stop_at(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    stopped = CliRunner().invoke(main, ["train", *flags(replace(config, out=str(tmp_path / "c")))])
    assert stopped.exit_code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step 3 of 12" in stopped.output


def test_command_without_clipping(pictures: str, tmp_path: Path) -> None:
    config = tiny(pictures, tmp_path, epochs=1)
    done = CliRunner().invoke(main, ["train", *flags(config), "--clip-norm", "0", "--quiet"])
    assert done.exit_code == 0, done.output
    assert done.output == ""
    assert checkpoint(tmp_path)["config"]["clip_norm"] is None
