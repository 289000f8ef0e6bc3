"""Rectangular images and sequences from data to samples: training and the command line."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import random_model
from click.testing import CliRunner, Result
from PIL import Image
from runs import assert_same_run, checkpoint, rows, tiny

import tarflow_fast as tff
from tarflow_fast.cli import main
from tarflow_fast.data import load_images
from tarflow_fast.errors import ArgumentError, DataError, TrainingStopped
from tarflow_fast.trainer import continued, train
from tarflow_fast.trainer.batches import Batches
from tarflow_fast.trainer.limits import parameters
from tarflow_fast.trainer.loop import _Run

RNG = np.random.default_rng(2)
RECTANGLES = RNG.integers(0, 256, (48, 6, 8), dtype=np.uint8)
SEQUENCES = RNG.normal(size=(48, 7, 5)).astype(np.float32)
LABELS = np.arange(48) % 3
FAST: dict[str, Any] = {"epochs": 2, "log_every": 1}
Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def _keep_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tarflow_fast.cli.train.keep_freed_memory", lambda: None)


@pytest.fixture
def rectangles(tmp_path: Path) -> str:
    np.savez(tmp_path / "rectangles.npz", images=RECTANGLES, labels=LABELS, class_names=["cat", "dog", "owl"])
    return str(tmp_path / "rectangles.npz")


@pytest.fixture
def sequences(tmp_path: Path) -> str:
    np.savez(tmp_path / "sequences.npz", data=SEQUENCES, labels=LABELS)
    return str(tmp_path / "sequences.npz")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line in a folder that has a model of rectangles and one of sequences, of three classes each."""
    monkeypatch.chdir(tmp_path)
    noise = {"noise_type": "gaussian", "noise_std": 0.1}
    models = {
        "r": random_model(1, in_channels=1, img_size=(6, 8), patch_size=(3, 2), num_classes=3),
        "s": random_model(2, in_channels=5, img_size=(7, 1), patch_size=1, layout="tokens", num_classes=3),
    }
    for name, model in models.items():
        model.metadata = dict(noise)
        tff.save(model, f"{name}.safetensors")
    models["s"].metadata["values"] = "raw"
    tff.save(models["s"], "s.safetensors")

    def run(*arguments: object, code: int = 0) -> Result:
        result = CliRunner().invoke(main, [str(a) for a in arguments], prog_name="tarflow-fast")
        assert result.exit_code == code, result.output
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result

    return run


def for_sequences(data: str, out: Path, **changes: Any) -> Any:
    return tiny(data, out, **{"layout": "tokens", "patch_size": 4, **FAST, **changes})


# --- training --------------------------------------------------------------------------------------------------------


def test_training_on_rectangles(rectangles: str, tmp_path: Path) -> None:
    """Grids of samples, held-out bits/dim, flips, and a model that samples."""
    every: dict[str, Any] = {"sample_every": 3, "sample_rows": 2, "eval_data": rectangles, "flip": True}
    config = tiny(rectangles, tmp_path / "run", patch_size=(3, 2), img_size=(6, 8), **FAST, **every)
    model = train(config, progress=False)
    assert (model.img_size, model.patch_size, model.config.num_patches) == ((6, 8), (3, 2), 8)
    found = tff.load(tmp_path / "run" / "model.safetensors")
    assert found.config == model.config
    assert tff.load(tmp_path / "run" / "checkpoint.pt").config == model.config
    assert math.isfinite(rows(tmp_path / "run", "eval")[-1]["bits_per_dim"])
    with Image.open(tmp_path / "run" / "samples" / "step_0000006.png") as picture:
        assert picture.size == (3 * (8 + 2) + 2, 2 * (6 + 2) + 2)
    assert tff.Sampler(found).sample(2, ["cat", "owl"]).images.shape == (2, 1, 6, 8)


def test_training_on_a_folder_of_pictures(tmp_path: Path) -> None:
    for i in range(16):
        (tmp_path / "data" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        pixels = RNG.integers(0, 256, (9, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / "ab"[i % 2] / f"{i}.png")
    config = tiny(str(tmp_path / "data"), tmp_path / "run", img_size=(4, 6), **FAST)
    assert train(config, progress=False).config.data_shape == (3, 4, 6)
    with pytest.raises(ArgumentError, match=r"img_size: expected a multiple of patch_size = 4, got \(4, 6\)"):
        train(replace(config, patch_size=4, out=str(tmp_path / "other")), progress=False)


def test_training_on_sequences(sequences: str, tmp_path: Path) -> None:
    config = for_sequences(sequences, tmp_path / "run", eval_data=sequences, noise_std=1e-5)
    x, y = Batches(load_images(sequences, layout="tokens"), config, torch.device("cpu"), 0, 1)(0)
    assert x.shape == (16, 7, 5)
    assert y is not None
    assert all(np.abs(SEQUENCES - each).max(axis=(1, 2)).min() < 1e-3 for each in x.numpy())
    model = train(config, progress=False)
    assert model.config == tff.TarFlowConfig.for_tokens(7, 5, 64, 2, 1, num_classes=3)
    assert model.metadata["values"] == "raw"
    assert tff.load(tmp_path / "run" / "model.safetensors").config == model.config
    assert math.isfinite(rows(tmp_path / "run", "eval")[-1]["bits_per_dim"])
    assert tff.Sampler(model).sample(3, 1).images.shape == (3, 7, 5)


def test_sequences_that_sample_wrote_need_no_layout(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=SEQUENCES, seed=0, first=0)
    config = tiny(str(tmp_path / "x.npz"), tmp_path / "run", patch_size=4, conditional=False, **FAST)
    assert train(config, progress=False).config.layout == "tokens"
    with pytest.raises(ArgumentError, match="patch_size: expected 4, its default, as sequences have no patches"):
        train(replace(config, patch_size=1, out=str(tmp_path / "other")), progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 2}, "patch_size: expected 4, its default, as sequences have no patches, got 2"),
        ({"img_size": 7}, "img_size: expected None, as sequences have no pixels, got 7"),
        ({"noise_type": "uniform"}, "noise_type: expected 'gaussian'"),
        ({"flip": True}, "flip: expected False, as sequences have no mirror image"),
        ({"sample_every": 5}, "sample_every: expected 0, as sequences make no picture"),
    ],
)
def test_what_sequences_do_not_have(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        for_sequences("absent", tmp_path / "run", **change)


@pytest.mark.parametrize("size", [(0, 8), (8, 8.0), (8,), (1, 2, 3), "8x8", True])
@pytest.mark.parametrize("name", ["img_size", "patch_size"])
def test_sizes_that_are_none(tmp_path: Path, name: str, size: Any) -> None:
    with pytest.raises(ArgumentError, match=f"{name}: expected an integer >= 1"):
        tiny("data", tmp_path, **{name: size})
    assert getattr(tiny("data", tmp_path, **{name: [8, 8]}), name) == 8


@pytest.mark.parametrize("kind", ["rectangles", "sequences"])
def test_resuming_is_exact(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = request.getfixturevalue(kind)

    def config(name: str) -> Any:
        if kind == "sequences":
            return for_sequences(data, tmp_path / name)
        return tiny(data, tmp_path / name, patch_size=(3, 2), img_size=(6, 8), **FAST)

    train(config("whole"), progress=False)
    step = _Run._step

    def stopping(self: _Run) -> None:
        step(self)
        if self.state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(_Run, "_step", stopping)
        with pytest.raises(TrainingStopped):
            train(config("parts"), progress=False)
    recorded = continued(tmp_path / "parts", {})
    assert (recorded.img_size, recorded.patch_size) == (config("parts").img_size, config("parts").patch_size)
    train(recorded, resume=True, progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_resuming_on_the_same_numbers_in_another_shape(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=SEQUENCES[:, None])
    config = tiny(str(tmp_path / "x.npz"), tmp_path / "run", values="raw", patch_size=1, conditional=False, **FAST)
    train(replace(config, epochs=1), progress=False)
    np.savez(tmp_path / "x.npz", images=SEQUENCES.reshape(-1, 1, 5, 7))
    with pytest.raises(ArgumentError, match="data: expected data of the shape in the run to be continued"):
        train(config, resume=True, progress=False)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_starting_from_a_model_of_rectangles(rectangles: str, tmp_path: Path, suffix: str) -> None:
    model = random_model(3, img_size=(6, 8), num_classes=3, channels=64)
    path = tmp_path / f"m.{suffix}"
    if suffix == "pth":
        with pytest.warns(tff.TarFlowWarning, match=r"img_size=\(6, 8\)"):
            tff.save(model, path)
    else:
        tff.save(model, path)
    how: dict[str, Any] = {"img_size": (6, 8)} if suffix == "pth" else {}
    config = tiny(rectangles, tmp_path / "run", **{**FAST, "epochs": 1}, **how)
    assert train(config, init=path, progress=False).config == model.config
    wrong = r"img_size: expected \(6, 8\), as in the model|8 pixels wide, not 6"  # the other way round, weights fit too
    with pytest.raises((ArgumentError, DataError), match=wrong):
        train(replace(config, img_size=(8, 6), out=str(tmp_path / "other")), init=path, progress=False)


def test_starting_from_a_model_of_sequences(sequences: str, rectangles: str, tmp_path: Path) -> None:
    """Which says that the data are sequences."""
    model = tff.TarFlow.for_tokens(7, 5, 64, 2, 1, num_classes=3)
    config = tiny(sequences, tmp_path / "run", patch_size=4, **FAST)
    assert train(config, init=model, progress=False).config == model.config
    other = {"out": str(tmp_path / "other")}
    with pytest.raises(ArgumentError, match="layout: expected 'tokens', as in the model that the run starts from"):
        train(replace(config, layout="NHWC", **other), init=model, progress=False)
    with pytest.raises(ArgumentError, match="patch_size: expected 4"):
        train(replace(config, patch_size=2, **other), init=model, progress=False)
    with pytest.raises(DataError, match="expected sequences of floats"):
        train(replace(config, data=rectangles, **other), init=model, progress=False)
    longer = tff.TarFlow.for_tokens(8, 5, 64, 2, 1, num_classes=3)
    with pytest.raises(ArgumentError, match=r"init: expected a model of sequences of shape \(7, 5\), got \(8, 5\)"):
        train(replace(config, **other), init=longer, progress=False)


def test_a_run_on_sequences_calls_them_so(
    sequences: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = for_sequences(sequences, tmp_path / "run", eval_data=sequences)
    with pytest.raises(ArgumentError, match="batch_size: expected at most 48, the number of sequences, got 49"):
        train(replace(config, batch_size=49), progress=False)
    np.savez(tmp_path / "other.npz", data=SEQUENCES[:, :6], labels=LABELS)
    with pytest.raises(ArgumentError, match=r"eval_data: expected sequences of shape \(7, 5\), got \(6, 5\)"):
        train(replace(config, eval_data=str(tmp_path / "other.npz")), progress=False)
    with pytest.warns(tff.TarFlowWarning, match="for 48 sequences batch_size=48 is taken"):
        train(replace(config, batch_size=None, out=str(tmp_path / "all")), progress="lines")
    said = capsys.readouterr().err
    assert " sequences/s  " in said
    assert "images" not in said
    weights = 21 * parameters(tff.TarFlowConfig.for_tokens(7, 5, 64, 2, 1, num_classes=3))
    monkeypatch.setattr("tarflow_fast.trainer.limits.free_memory", lambda device: weights)
    with pytest.raises(tff.OutOfMemoryError, match="a step of 16 sequences takes at least"):
        train(config, progress=False)


def test_starting_from_a_model_of_latents(tmp_path: Path) -> None:
    """Of a number of channels that no pictures have."""
    np.save(tmp_path / "x.npy", RNG.normal(size=(16, 4, 6, 8)).astype(np.float32))
    model = random_model(4, in_channels=4, img_size=(6, 8))
    config = tiny(str(tmp_path / "x.npy"), tmp_path / "run", layout="NCHW", conditional=False, **FAST)
    assert train(config, init=model, progress=False).config == model.config


# --- the command line ------------------------------------------------------------------------------------------------

SMALL = ("--channels", 64, "--blocks", 2, "--layers", 1, "--epochs", 1, "--batch-size", 16, "--dtype", "float32")


def test_train_command(run: Run, rectangles: str, sequences: str) -> None:
    run("train", "--data", rectangles, "--img-size", "6x8", "--patch-size", "3X2", *SMALL, "--out", "a", "-q")
    assert checkpoint(Path("a"))["config"]["img_size"] == (6, 8)
    assert checkpoint(Path("a"))["sizes"]["patch_size"] == (3, 2)
    run("train", "--resume", "--out", "a", "--epochs", 2, "--img-size", "6×8", "-q")
    assert "--img-size: expected 6x8, as in the run to be continued, got 8" in (
        run("train", "--resume", "--out", "a", "--img-size", "8x8", code=2).stderr
    )
    run("train", "--data", sequences, "--layout", "tokens", *SMALL, "--out", "b", "-q")
    run("train", "--init", "b/model.safetensors", "--data", sequences, *SMALL, "--out", "c", "-q")
    assert tff.load("c/model.safetensors").config == tff.load("b/model.safetensors").config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--patch-size", 2), "--patch-size: expected 4, its default, as sequences have no patches, got 2"),
        (("--patch-size", "2x3"), "--patch-size: expected 4, its default, as sequences have no patches, got 2x3"),
        (("--img-size", 7), "--img-size: expected none, as sequences have no pixels, got 7"),
        (("--noise-type", "uniform"), "--noise-type: expected 'gaussian', as only 8-bit values"),
        (("--flip",), "--flip: expected none, as sequences have no mirror image"),
        (("--sample-every", 2), "--sample-every: expected 0, as sequences make no picture, got 2"),
        (("--img-size", "7x"), "'--img-size': '7x' is neither a whole number"),
        (("--img-size", "7x8x9"), "'--img-size': '7x8x9' is neither a whole number"),
        (("--img-size", "0x9"), "--img-size: expected an integer >= 1, got 0"),
    ],
)
def test_train_command_refuses(run: Run, sequences: str, options: tuple[Any, ...], message: str) -> None:
    result = run("train", "--data", sequences, "--layout", "tokens", *options, *SMALL, "--out", "a", code=2)
    assert message in result.stderr
    assert not Path("a").exists()


def test_sample_of_rectangles(run: Run) -> None:
    result = run("sample", "-m", "r.safetensors", "-n", 6, "--scale", 1, "--npz", "r.npz", "--gif", "r.gif")
    assert "6 images of 6×8, unguided, denoised\n" in result.stdout
    with Image.open("samples.png") as picture:
        assert picture.size == (2 * 10 + 2, 3 * 8 + 2)
    with np.load("r.npz") as file:
        assert file["images"].shape == (6, 1, 6, 8)
    run("sample", "-m", "r.safetensors", "-n", 1, "--singles", "one")
    with Image.open("one/00000.png") as picture:
        assert picture.size == (8, 6)


def test_sample_of_sequences(run: Run) -> None:
    result = run("sample", "-m", "s.safetensors", "-n", 6, "--npz", "s.npz", "--labels", "0,2")
    assert "s.npz: 6 sequences of 7 tokens of 5 values, unguided, denoised\n" in result.stdout
    assert " sequences/s, " in result.stdout
    assert "images/s" not in result.stdout
    assert not Path("samples.png").exists()
    wanted = tff.Sampler(tff.load("s.safetensors")).sample(6, [0, 2], denoise=True)
    with np.load("s.npz") as file:
        assert file["images"].shape == (6, 7, 5)
        assert np.abs(file["images"] - wanted.images.numpy()).max() < 1e-5
        assert file["labels"].tolist() == [0, 2] * 3
    facts = json.loads(run("sample", "-m", "s.safetensors", "-n", 2, "--npz", "s.npz", "--no-grid", "--json").stdout)
    assert facts["files"] == {"npz": "s.npz"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "this model draws sequences, which make no picture: give --npz"),
        (("--npz", "s.npz", "--out", "s.png"), "--out: sequences make no picture; --npz writes them as numbers"),
        (("--npz", "s.npz", "--gif", "s.gif"), "--gif: sequences make no picture; --npz writes them as numbers"),
        (("--singles", "s"), "--singles: sequences make no picture; --npz writes them as numbers"),
    ],
)
def test_sample_of_sequences_draws_no_picture(run: Run, options: tuple[str, ...], message: str) -> None:
    assert message in run("sample", "-m", "s.safetensors", "-n", 2, *options, code=2).stderr
    assert not any(Path(name).exists() for name in ("samples.png", "s.png", "s.gif", "s", "s.npz"))


def test_eval(run: Run, rectangles: str, sequences: str) -> None:
    facts = json.loads(run("eval", "-m", "r.safetensors", "--data", rectangles, "--json").stdout)
    assert (facts["images"], facts["bayes_accuracy"]["images"]) == (48, 48)
    facts = json.loads(run("eval", "-m", "s.safetensors", "--data", sequences, "--json").stdout)
    model = tff.load("s.safetensors")
    found = tff.bits_per_dim(model, load_images(sequences, layout="tokens", split="test"))
    assert abs(facts["bits_per_dim"]["mean"] - found.mean) < 1e-5
    assert facts["bayes_accuracy"]["images"] == 48
    said = run("eval", "-m", "s.safetensors", "--data", sequences).stdout
    assert f"on {sequences}, 48 sequences\n" in said
    assert "noisy sequences: compares between models of this noise level and the same data only, in their own" in said
    plain = tff.TarFlow.for_tokens(7, 5, 64, 2, 1)
    tff.save(plain, "plain.safetensors")
    np.save("plain.npy", SEQUENCES)
    said = run("eval", "-m", "plain.safetensors", "--data", "plain.npy").stdout
    assert "(no noise; " in said
    assert "the density of the sequences in their own unit: compares between models of the same data only\n" in said
    refused = run("eval", "-m", "s.safetensors", "--data", sequences, "--layout", "NHWC", code=2).stderr
    assert "--layout: expected tokens, as the model's data are sequences, got NHWC" in refused
    np.save("short.npy", SEQUENCES[:, :6])
    assert "expected shape (n >= 1, 7, 5), got (48, 6, 5)" in (
        run("eval", "-m", "s.safetensors", "--data", "short.npy", code=1).stderr
    )
    assert "its images are 8 pixels wide, not 28" in run("eval", "--data", rectangles, code=1).stderr
    refused = run("eval", "-m", "r.safetensors", "--data", sequences, "--layout", "tokens", code=2).stderr
    assert "--layout: expected auto, NHWC or NCHW, as the model's data are images, got tokens" in refused


def test_info(run: Run) -> None:
    lines = run("info", "r.safetensors").stdout
    assert "images: 1×6×8 in patches of 3×2, 8 tokens of 6 values" in lines
    assert json.loads(run("info", "r.safetensors", "--json").stdout)["model"]["img_size"] == [6, 8]
    assert "  sequences: 7 tokens of 5 values" in run("info", "s.safetensors").stdout
    assert "images: 1×28×28 in patches of 4×4, 49 tokens of 16 values" in run("info").stdout


def test_pth_of_rectangles(run: Run) -> None:
    """Weights alone leave open how wide an image is."""
    result = run("convert", "r.safetensors", "r.pth")
    assert "load it with --patch-size 3x2, --img-size 6x8, or save" in result.stderr
    sizes = ("--patch-size", "3x2", "--img-size", "6x8")
    run("convert", "r.pth", "again.safetensors", *sizes)
    again, model = tff.load("again.safetensors"), tff.load("r.safetensors")
    assert again.config == model.config
    assert "images: 1×6×8 in patches of 3×2" in run("info", "r.pth", *sizes).stdout
    run("sample", "-m", "r.pth", *sizes, "-n", 2, "--scale", 1, "-q")
    np.save("x.npy", RECTANGLES)
    assert "bits/dim" in run("eval", "-m", "r.pth", *sizes, "--data", "x.npy").stdout
    wrong = run("info", "r.pth", "--patch-size", "3x2", "--img-size", "6x6", code=2).stderr
    assert "--img-size: expected a size of 8 patches of 3×2, got 6" in wrong
    wrong = run("info", "r.pth", "--patch-size", "3x2", "--img-size", "6x12", code=2).stderr
    assert "--img-size: expected a size of 8 patches of 3×2, got 6x12" in wrong
    assert "--img-size goes with --model" in run("sample", "--img-size", "6x8", code=2).stderr
    assert "0 is not in the range" in run("info", "r.pth", "--patch-size", "0x3", code=2).stderr
