"""What a run writes: models, checkpoints, grids, metrics, progress."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from runs import (
    CLASSES,
    STEPS,
    assert_same,
    checkpoint,
    rows,
    tiny,
)
from torch import Tensor

import tarflow_fast as tff
from tarflow_fast.data import load_images
from tarflow_fast.errors import ArgumentError, TrainingDiverged
from tarflow_fast.evaluation import Noise, bits_per_dim
from tarflow_fast.trainer import train
from tarflow_fast.trainer.metrics import MetricsLog

CPU = torch.device("cpu")


def test_model_file_is_the_average(pictures: str, tmp_path: Path) -> None:
    config = tiny(pictures, tmp_path, eval_data=pictures, eval_images=20, noise_std=0.1, ema_decay=0.8)
    average = train(config, progress=False)
    model = tff.load(tmp_path / "model.safetensors")
    content = checkpoint(tmp_path)
    assert_same(dict(model.state_dict()), dict(average.state_dict()))
    assert_same(dict(model.state_dict()), dict(content["ema"]))
    assert not torch.equal(content["ema"]["blocks.0.pos_embed"], content["model"]["blocks.0.pos_embed"])
    names = ["cat", "dog", "owl"]
    assert model.metadata == {"noise_type": "gaussian", "noise_std": 0.1, "class_names": names, "steps": STEPS}
    held_out = load_images(pictures).spread(20)
    found = bits_per_dim(model, held_out.images, held_out.labels, noise=Noise("gaussian", 0.1))
    assert rows(tmp_path, "eval") == [
        {"step": STEPS, "epoch": 3.0, "bits_per_dim": pytest.approx(found.mean, rel=1e-6)}
    ]


def test_a_checkpoint_is_a_model_file_too(pictures: str, tmp_path: Path) -> None:
    """With its average, sizes that weights leave open, noise and class names; what was taken is said."""
    train(tiny(pictures, tmp_path, head_dim=32, noise_std=0.1, ema_decay=0.8), progress=False)
    model = tff.load(tmp_path / "model.safetensors")
    with pytest.warns(tff.TarFlowWarning, match="its weights 'ema' were taken, not 'model'; weights='model' takes"):
        again = tff.load(tmp_path / "checkpoint.pt")
    assert again.config == model.config
    assert again.metadata == model.metadata
    assert_same(dict(again.state_dict()), dict(model.state_dict()))
    raw = tff.load(tmp_path / "checkpoint.pt", weights="model")
    assert_same(dict(raw.state_dict()), dict(checkpoint(tmp_path)["model"]))
    content = checkpoint(tmp_path)
    del content["sizes"], content["metadata"]  # as versions before this one wrote it
    torch.save(content, tmp_path / "old.pt")
    old = tff.load(tmp_path / "old.pt", weights="ema")
    assert old.config == model.config
    assert old.metadata == {"noise_type": "gaussian", "noise_std": 0.1}


def test_metadata_of_uniform_noise_and_given_names(pictures: str, tmp_path: Path) -> None:
    names = ("a", "b", "c", "none of these")
    model = train(tiny(pictures, tmp_path, epochs=1, noise_type="uniform", class_names=names), progress=False)
    assert model.metadata == {"noise_type": "uniform", "class_names": list(names), "steps": 4}
    assert model.config.num_classes == 4


def test_sample_grids(pictures: str, tmp_path: Path) -> None:
    train(tiny(pictures, tmp_path, sample_every=5, sample_rows=2, sample_guidance=1.0), progress=False)
    grids = sorted((tmp_path / "samples").iterdir())
    assert [path.name for path in grids] == [f"step_{step:07d}.png" for step in (5, 10, 12)]
    with Image.open(grids[-1]) as grid:
        assert grid.size == (CLASSES * 10 + 2, 2 * 10 + 2)  # frames of 2 pixels


def test_diverged_run_keeps_its_checkpoint(pictures: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tff.TarFlow.get_loss
    losses = []

    def get_loss(model: tff.TarFlow, z: Tensor, log_det: Tensor) -> Tensor:
        losses.append(plain(model, z, log_det))
        return losses[-1] * (math.nan if len(losses) == 5 else 1)

    monkeypatch.setattr(tff.TarFlow, "get_loss", get_loss)
    with pytest.raises(TrainingDiverged, match="loss is nan by step 6"):
        train(tiny(pictures, tmp_path, checkpoint_every=3, log_every=100), progress=False)
    assert checkpoint(tmp_path)["step"] == 3


def test_far_too_high_a_rate_is_noticed(pictures: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match="try a lower lr"):
        train(tiny(pictures, tmp_path, lr=1e12, warmup_steps=0, clip_norm=None), progress=False)


def test_metrics_log_drops_later_and_half_rows(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for step in (2, 4, 6):
        log.write("train", step, {"loss": step / 3, "lr": 1e-4})
    with (tmp_path / "train.csv").open("a") as file:
        file.write("1")  # of "10,0.5,0.0001"
    MetricsLog(tmp_path, 4).write("train", 5, {"loss": 1.0, "lr": 2e-4})
    assert (tmp_path / "train.csv").read_text().split() == [
        "step,loss,lr",
        "2,0.66666667,0.0001",
        "4,1.3333333,0.0001",
        "5,1,0.0002",
    ]
    MetricsLog(tmp_path)
    assert not (tmp_path / "train.csv").exists()


def test_tensorboard(pictures: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tiny(pictures, tmp_path / "run", tensorboard=True), progress=False)
    read = events.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    read.Reload()
    for name in ("loss", "lr", "grad_norm"):
        logged = [(event.step, event.value) for event in read.Scalars(f"train/{name}")]
        assert logged == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows(tmp_path / "run")]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ArgumentError, match=r"tensorboard: expected .*pip install"):
        train(tiny(pictures, tmp_path / "other", tensorboard=True), progress=False)


def test_progress_bar(pictures: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny(pictures, tmp_path / "a", epochs=1), progress=False)
    assert capsys.readouterr() == ("", "")
    train(tiny(pictures, tmp_path / "b", epochs=1))
    shown = capsys.readouterr().err
    assert "4/4" in shown
    assert f"loss={rows(tmp_path / 'b')[-1]['loss']:.4f}" in shown


@pytest.mark.slow
def test_compiled_training(pictures: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By dynamo's eager backend, as code generation takes minutes on a CPU."""
    compiled = []
    plain = torch.compile

    def compile_eagerly(model: tff.TarFlow) -> Any:
        compiled.append(model)
        return plain(model, backend="eager")

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    for choice in (False, True):
        train(tiny(pictures, tmp_path / str(choice), compile=choice), progress=False)
    assert [type(model) for model in compiled] == [tff.TarFlow]
    a, b = checkpoint(tmp_path / "False"), checkpoint(tmp_path / "True")
    assert_same(dict(a["model"]), dict(b["model"]), atol=1e-5, rtol=1e-4)
