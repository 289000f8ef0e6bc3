"""What training refuses before any work: files of others, and what no machine holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import tiny, write_pictures

import tarflow_fast as tff
from tarflow_fast.errors import ArgumentError, DataError
from tarflow_fast.trainer import TrainConfig, train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures.npz")


@pytest.mark.parametrize("name", ["train.csv", "eval.csv", "model.safetensors"])
def test_files_of_others_stay(data: str, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ArgumentError, match=f"out: expected a folder without {name}"):
        train(tiny(data, tmp_path), progress=False)
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_metrics_of_others_are_not_cut(data: str, tmp_path: Path) -> None:
    train(tiny(data, tmp_path, epochs=1), progress=False)
    for text in ("id,label\n1,2\n", "\0\xff\n"):
        (tmp_path / "train.csv").write_text(text)
        with pytest.raises(DataError, match=r"train\.csv: not the metrics"):
            train(tiny(data, tmp_path, epochs=1), resume=True, progress=False)
        assert (tmp_path / "train.csv").read_text() == text


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_out_must_be_a_folder(data: str, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArgumentError, match="out: expected a folder, got"):
        train(tiny(data, tmp_path / place), progress=False)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_data": "nowhere.npz"}, "eval_data: expected a file or folder that is there"),
        ({"sample_every": 1, "sample_rows": 10**8}, "sample_rows: expected at most 5208333"),
        ({"epochs": 10**12}, "epochs: expected at most 2500000000"),
        ({"conditional": False, "sample_guidance": 1.0, "sample_every": 1}, "sample_guidance: expected 0"),
    ],
)
def test_what_cannot_be_is_said_at_once(data: str, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        train(tiny(data, tmp_path / "a" / "run", **changes), progress=False)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "changes",
    [{"channels": 2**24 * 64}, {"num_blocks": 10**9}, {"layers_per_block": 10**9}, {"img_size": 2**30}],
)
def test_models_that_no_machine_holds(data: str, tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(tff.OutOfMemoryError, match=r"takes at least [\d,.]+ GB to train; cpu has .* GB free"):
        train(tiny(data, tmp_path / "run", **{"img_size": 8, **changes}), progress=False)
    assert os.listdir(tmp_path) == []


def test_batches_that_no_machine_holds(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tarflow_fast.trainer.limits.free_memory", lambda device: 3_000_000)
    with pytest.raises(tff.OutOfMemoryError, match=r"a step of 64 images .* batches of less than \d+"):
        train(tiny(data, tmp_path / "run", batch_size=64), progress=False)


@pytest.mark.parametrize("device", ["foo", "meta", "mps"])
def test_devices_that_no_run_trains_on(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tarflow_fast.devices.device_missing", lambda kind: None)
    with pytest.raises(ArgumentError, match=r"^device: expected "):
        train(TrainConfig("none", str(tmp_path / "run"), device=device))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_run_on_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"device: expected a device of this machine, got .*CUDA"):
        train(TrainConfig("none", str(tmp_path / "run"), device="cuda"))
