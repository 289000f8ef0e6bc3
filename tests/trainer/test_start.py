"""How a run starts and goes on: --init, --resume alone, and what it shows."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from runs import assert_same, assert_same_run, checkpoint, flags, rows, tiny, write_pictures

import tarflow_fast as tff
from tarflow_fast.cli import main
from tarflow_fast.errors import ArgumentError, CheckpointError, DataError
from tarflow_fast.trainer import TrainConfig, continued, train
from tarflow_fast.trainer.limits import parameters
from tarflow_fast.trainer.loop import _Run
from tarflow_fast.trainer.processes import Processes
from tarflow_fast.trainer.progress import Progress

NAMES = ["cat", "dog", "owl"]
SIZES = {"patch_size": 4, "channels": 128, "num_blocks": 3, "layers_per_block": 1, "nvp": False, "head_dim": 32}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures.npz")


@pytest.fixture(autouse=True)
def _keep_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tarflow_fast.cli.train.keep_freed_memory", lambda: None)


def some_model(num_classes: int = 3, **changes: Any) -> tff.TarFlow:
    """Of other sizes than a run's defaults, and with weights of its own."""
    model = tff.TarFlow(**{"in_channels": 1, "img_size": 8, "num_classes": num_classes, **SIZES, **changes})
    for block in model.blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=0.02)
    return model


def plain(data: str, out: Path, **changes: Any) -> TrainConfig:
    """`tiny` without sizes: those of the defaults."""
    defaults = TrainConfig("d", "o")
    return replace(tiny(data, out, **changes), **{name: getattr(defaults, name) for name in SIZES})


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["train", *arguments])
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


# --- from a model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pth", "safetensors", "memory"])
def test_starts_from_a_model(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The first step's loss is the model's own, its sizes are recorded, and the run resumes without it."""
    model = some_model(head_dim=64 if kind == "pth" else 32)
    path = tmp_path / f"old.{kind}"
    if kind != "memory":
        tff.save(model, path)
    init: Any = model if kind == "memory" else path
    config = plain(data, tmp_path / "run", log_every=1, epochs=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = train(config, init=init, progress=False)
    assert_same(before, dict(model.state_dict()))
    assert trained.config == model.config
    assert trained.metadata["init"] == ("a model in memory" if kind == "memory" else f"old.{kind}")
    assert tff.load(tmp_path / "run" / "model.safetensors").metadata == trained.metadata
    (tmp_path / "other").mkdir()
    alone = Processes(0, 1, torch.device("cpu"))
    x, y = _Run(plain(data, tmp_path / "other"), alone, False, init, "none", False).batches(0)
    z, _, log_det = model.train()(x, y)
    assert rows(tmp_path / "run")[0]["loss"] == pytest.approx(model.get_loss(z, log_det).item(), abs=1e-5)
    for size, value in SIZES.items():
        if size != "head_dim":
            assert checkpoint(tmp_path / "run")["config"][size] == value
    path.unlink(missing_ok=True)
    longer = continued(tmp_path / "run", {"epochs": 2})
    assert train(longer, resume=True, progress=False).metadata == {**trained.metadata, "steps": 8}


def test_command_starts_from_a_model(data: str, tmp_path: Path) -> None:
    """As in Python; sizes need not be given, and may be if they are the model's."""
    path = tmp_path / "old.safetensors"
    tff.save(some_model(), path)
    schedule = ["--epochs", "1", "--batch-size", "16", "--dtype", "float32", "--data", data, "--init", str(path), "-q"]
    run(*schedule, "--out", str(tmp_path / "a"))
    run(*schedule, "--out", str(tmp_path / "b"), "--channels", "128", "--vp", "--conditional", "--patch-size", "4")
    assert_same_run(tmp_path / "a", tmp_path / "b")
    python = TrainConfig(data, str(tmp_path / "c"), epochs=1, batch_size=16, dtype="float32")
    train(python, init=path, progress=False)
    assert_same_run(tmp_path / "a", tmp_path / "c")


def test_weights_that_leave_sizes_open(data: str, tmp_path: Path) -> None:
    """Tokens of 16 values: 1 channel of a patch of 4, or 4 of 2; heads of 32."""
    tff.save(some_model(), tmp_path / "old.pth")
    options = ["--data", data, "--epochs", "1", "--batch-size", "16", "-q", "--init", str(tmp_path / "old.pth")]
    run(*options, "--out", str(tmp_path / "run"), "--head-dim", "32", "--patch-size", "4", "--in-channels", "1")
    assert tff.load(tmp_path / "run" / "model.safetensors").config == some_model().config


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--channels", "512"), "--channels: expected 128, as in the model that the run starts from, got 512"),
        (("--blocks", "8"), "--blocks: expected 3"),
        (("--layers", "2"), "--layers: expected 1"),
        (("--nvp",), "--nvp: expected --vp, as in"),
        (("--unconditional",), "--unconditional: expected --conditional, as in"),
        (("--patch-size", "2"), "--patch-size: expected"),
        (("--img-size", "16"), "--img-size: expected 8"),
    ],
)
def test_options_that_contradict_the_model(data: str, tmp_path: Path, option: tuple[str, ...], message: str) -> None:
    """Also where they are the defaults."""
    tff.save(some_model(), tmp_path / "old.safetensors")
    init = ["--init", str(tmp_path / "old.safetensors")]
    result = run("--data", data, "--out", str(tmp_path / "run"), "--batch-size", "16", *init, *option, code=2)
    assert message in result.stderr
    assert result.stderr.count("Error: ") == 1
    assert not (tmp_path / "run").exists()


def test_contradictions_in_python(data: str, tmp_path: Path) -> None:
    for changes in ({"channels": 64}, {"conditional": False}, {"nvp": False, "num_blocks": 2}):
        with pytest.raises(ArgumentError, match="as in the model that the run starts from"):
            train(replace(plain(data, tmp_path / "run"), **changes), init=some_model(), progress=False)
    with pytest.raises(ArgumentError, match="init: expected None, as resume is given"):
        train(plain(data, tmp_path / "run"), init=some_model(), resume=True, progress=False)
    with pytest.raises(ArgumentError, match="init: expected a TarFlow or a path, got int"):
        train(plain(data, tmp_path / "run"), init=3, progress=False)  # type: ignore[arg-type]
    assert "exclude" in run("--data", data, "--out", "x", "--resume", "--init", __file__, code=2).stderr
    with pytest.raises(CheckpointError, match="no such file"):
        train(plain(data, tmp_path / "run"), init=tmp_path / "none.pth", progress=False)


def test_data_must_be_the_models(data: str, tmp_path: Path) -> None:
    def refused(model: tff.TarFlow, message: str, path: str = data) -> None:
        with pytest.raises(ArgumentError, match=message):
            train(plain(path, tmp_path / "run"), init=model, progress=False)

    refused(some_model(in_channels=3), r"init: expected a model of images of shape \(1, 8, 8\), got \(3, 8, 8\)")
    with pytest.raises(DataError, match="its images are 8 pixels wide, not 16"):
        train(plain(data, tmp_path / "run"), init=some_model(img_size=16), progress=False)
    refused(some_model(num_classes=4), "init: expected a model of the data's 3 classes, got one of 4")
    named = some_model()
    named.metadata["class_names"] = ["dog", "cat", "owl"]
    refused(named, r"init: expected a model of the data's classes \['cat', 'dog', 'owl'\], got one of \['dog', 'cat'")
    with np.load(data) as arrays:
        np.savez(tmp_path / "nameless.npz", images=arrays["images"], labels=arrays["labels"])
    wide = some_model(num_classes=4)
    wide.metadata["class_names"] = [*NAMES, "yak"]
    config = plain(str(tmp_path / "nameless.npz"), tmp_path / "run", epochs=1)
    assert train(config, init=wide, progress=False).metadata["class_names"] == [*NAMES, "yak"]
    unlabelled = train(plain(data, tmp_path / "plain", epochs=1), init=some_model(num_classes=0), progress=False)
    assert unlabelled.config.num_classes == 0


def test_other_noise_than_the_models_is_said(data: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = some_model()
    model.metadata |= {"noise_type": "gaussian", "noise_std": 0.07}
    train(plain(data, tmp_path / "run", epochs=1), init=model, progress="lines")
    assert "a model in memory was trained with noise_std 0.07; this run has 0.05" in capfd.readouterr().err


# --- going on --------------------------------------------------------------------------------------------------------


def test_resume_and_out_suffice(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another folder than the one where the run began, with the data's path relative to that."""
    options = {"nvp": False, "clip_norm": None, "class_names": ("x", "y", "z"), "flip": True, "log_every": 3}
    whole = tiny(data, tmp_path / "whole", threads=1, epochs=2, **options)
    train(whole, progress=False)
    monkeypatch.chdir(Path(data).parent)
    for_command = replace(tiny(Path(data).name, tmp_path / "parts", threads=1, epochs=1, **options), clip_norm=1.0)
    run(*flags(for_command), "--clip-norm", "0", "-q")
    monkeypatch.chdir(tmp_path)
    run("--resume", "--out", "parts", "--epochs", "2", "-q")
    ours, theirs = checkpoint(tmp_path / "parts")["config"], checkpoint(tmp_path / "whole")["config"]
    assert {**ours, "out": 0} == {**theirs, "out": 0}
    again = run("--resume", "--out", "parts")
    assert "parts: goes on after step 8 of 8" in again.stderr
    assert again.stdout == "parts/model.safetensors\n"


def test_resume_with_the_whole_command(data: str, tmp_path: Path) -> None:
    config = tiny(data, tmp_path / "run", epochs=1)
    run(*flags(config), "-q")
    run(*flags(replace(config, epochs=2, checkpoint_every=3, sample_every=4)), "--resume", "-q")
    assert checkpoint(tmp_path / "run")["step"] == 8
    assert checkpoint(tmp_path / "run")["config"]["checkpoint_every"] == 3


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--lr", "1e-4"), "--lr: expected 0.003, as in the run to be continued, got 0.0001"),
        (("--channels", "512"), "--channels: expected 64"),  # the default, and given
        (("--blocks", "8"), "--blocks: expected 2"),
        (("--clip-norm", "0"), "--clip-norm: expected 1.0"),
        (("--seed", "1"), "--seed: expected 0"),
        (("--class-names", "a,b,c"), "--class-names: expected none, as in the run to be continued, got 'a', 'b', 'c'"),
        (("--unconditional",), "--unconditional: expected --conditional, as in"),
        (("--epochs", "0"), "--epochs: expected an integer >= 1"),
    ],
)
def test_options_that_a_run_cannot_take(data: str, tmp_path: Path, option: tuple[str, ...], message: str) -> None:
    train(tiny(data, tmp_path / "run", epochs=1), progress=False)
    result = run("--resume", "--out", str(tmp_path / "run"), *option, code=2)
    assert message in result.stderr
    assert result.stderr.count("Error: ") == 1


def test_resume_needs_a_run(data: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "none")
    for more in ([], ["--data", data]):
        result = run("--resume", "--out", missing, *more, code=1)
        assert f"--resume: expected a checkpoint {missing}/checkpoint.pt, got none" in result.stderr
    assert not Path(missing).exists()
    assert "Missing option '--data'" in run("--out", missing, code=2).stderr
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"no checkpoint")
    result = run("--resume", "--out", str(tmp_path / "run"), code=1)
    assert "checkpoint.pt: not a whole training checkpoint" in result.stderr


def test_other_classes_are_not_continued(data: str, tmp_path: Path) -> None:
    train(tiny(data, tmp_path / "run", epochs=1), progress=False)
    with np.load(data) as arrays:
        np.savez(tmp_path / "other.npz", **{**arrays, "class_names": np.array(["cat", "owl", "dog"])})
    other = tiny(str(tmp_path / "other.npz"), tmp_path / "run", epochs=2)
    with pytest.raises(ArgumentError, match=r"data: expected the classes of the run to be continued, \['cat', 'dog'"):
        train(other, resume=True, progress=False)


def test_threads_are_the_runs_while_it_lasts(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    plain_step = _Run._step
    monkeypatch.setattr(_Run, "_step", lambda run: (seen.append(torch.get_num_threads()), plain_step(run)))
    before = torch.get_num_threads()
    train(tiny(data, tmp_path, epochs=1, threads=before + 1), progress=False)
    assert seen == [before + 1] * 4
    assert torch.get_num_threads() == before


# --- what is shown ---------------------------------------------------------------------------------------------------

LINE = re.compile(r"step (\d+)/12  loss=-?\d+\.\d{4}  epoch=\d\.\d\d  \d[\d.e+]* images/s  \d:\d\d:\d\d left")


def test_lines_where_there_is_no_terminal(data: str, tmp_path: Path) -> None:
    result = run(*flags(tiny(data, tmp_path / "run", log_every=5)))
    assert [int(match[1]) for match in map(LINE.fullmatch, result.stderr.splitlines()) if match] == [5, 10, 12]
    assert result.stderr.count("\n") == 3
    for flag in ("--quiet", "--no-progress"):
        assert run(*flags(tiny(data, tmp_path / flag)), flag).stderr == ""


def test_bar_on_a_terminal(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "12/12" in run(*flags(tiny(data, tmp_path / "a")), "--progress").stderr
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    train(tiny(data, tmp_path / "b"))
    with pytest.raises(ArgumentError, match="progress: expected one of"):
        train(tiny(data, tmp_path / "c"), progress="dots")


def test_rate_and_time_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The rate is that since the last line, the time left goes by all steps of this process."""
    clock = iter([0.0, 10.0, 30.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    progress = Progress("lines", 100, 1000, 16, "images")
    progress.row(200, {})
    progress.row(300, {})
    first, second = capsys.readouterr().err.splitlines()
    assert "160 images/s" in first
    assert first.endswith("0:01:20 left")
    assert "80 images/s" in second
    assert second.endswith("0:01:45 left")


# --- names and bounds ------------------------------------------------------------------------------------------------


def test_errors_name_the_option(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "cat"
    folder.mkdir(parents=True)
    tff.images.save_png(torch.zeros(3, 8, 8), folder / "0.png")
    for options, message in (
        ([], "--img-size: expected pixels along a side"),
        (["--img-size", "8", "--blocks", "0"], "--blocks: expected an integer >= 1"),
        (["--img-size", "8", "--noise-std", "nan"], "--noise-std: expected a finite number"),
        (["--img-size", "9"], "--img-size: expected a multiple of --patch-size = 4, got 9"),
        (["--img-size", "8", "--batch-size", "2"], "--batch-size: expected at most 1, the number of images"),
        (["--img-size", "8", "--eval-every", "1"], "--eval-data: expected a path, as --eval-every is given, got none"),
        (["--img-size", "8", "--seed", str(2**63)], "--seed: expected an integer <= 9223372036854775807"),
        (["--img-size", "8", "--warmup-steps", "1" + "0" * 400], "--warmup-steps: expected an integer <= "),
    ):
        result = run("--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), *options, code=2)
        assert message in result.stderr
    with pytest.raises(ArgumentError, match="img_size: expected pixels"):
        train(TrainConfig(str(tmp_path / "data"), str(tmp_path / "run")), progress=False)
    with pytest.raises(ArgumentError, match="out: expected a path"):
        TrainConfig("d", "a\0b")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("nvp", [True, False])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_number_of_parameters(nvp: bool, num_classes: int) -> None:
    model = some_model(num_classes, nvp=nvp, layers_per_block=2)
    assert parameters(model.config) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.skipif(sys.platform == "win32", reason="folders are closed to writing otherwise there")
def test_paths_are_recorded_whole(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(tiny(data, Path("run"), epochs=1, eval_data=data), progress=False)
    recorded = checkpoint(Path("run"))["config"]
    assert (recorded["data"], recorded["eval_data"], recorded["out"]) == (data, data, str(tmp_path / "run"))


@pytest.mark.parametrize("named", [True, False])
def test_labels_of_a_started_run_are_the_models_and_it_goes_on(
    tmp_path: Path, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of data that has some of the model's classes alone, in numbers: here 1 and 2 of three."""
    model = some_model()
    model.metadata = {"class_names": NAMES} if named else {}
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "some.npz", images=pixels, labels=np.arange(12) % 2 + 1)
    seen = []

    class Seen(_Run):
        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **options)
            assert self.held_out is not None
            seen.append((self.batches.data.labels.tolist(), self.held_out.labels.tolist()))

    monkeypatch.setattr("tarflow_fast.trainer.loop._Run", Seen)
    path, out = str(tmp_path / "some.npz"), tmp_path / "run"
    train(plain(path, out, eval_data=path, batch_size=12, epochs=1), init=model, progress=False)
    again = train(continued(out, {"epochs": 2}), resume=True, progress=False)
    assert seen == [([1, 2] * 6, [1, 2] * 6)] * 2
    assert again.config == model.config
    assert again.metadata.get("class_names") == model.metadata.get("class_names")


# --- the size of a batch ---------------------------------------------------------------------------------------------


def test_few_images_are_one_batch_unless_told(data: str, tmp_path: Path) -> None:
    sizes = [*("--patch-size", "2", "--channels", "64", "--blocks", "1", "--layers", "1"), "--dtype", "float32"]
    line = ["--data", data, *sizes, "--no-progress", "--epochs", "1", "--out", str(tmp_path / "run")]
    images = len(tff.load_images(data))
    said = run(*line).stderr
    assert said == f"Warning: for {images} images --batch-size {images} is taken, not 256\n"
    assert checkpoint(tmp_path / "run")["config"]["batch_size"] == images
    assert checkpoint(tmp_path / "run")["step"] == 1
    assert run("--resume", "--out", str(tmp_path / "run"), "--epochs", "2", "--no-progress").stderr == ""
    python = replace(continued(tmp_path / "run", {"epochs": 3}), batch_size=None)  # the default again
    train(python, resume=True, progress=False)
    assert checkpoint(tmp_path / "run")["step"] == 3


@pytest.mark.parametrize(
    ("given", "images", "processes", "size"),
    [
        (None, 1000, 1, 256),
        (None, 100, 1, 100),
        (None, 1000, 3, 255),
        (None, 2, 3, 3),
        (7, 1000, 3, 7),
        (500, 100, 1, 500),
    ],
)
def test_batch_size_for(given: int | None, images: int, processes: int, size: int) -> None:
    """What is given is kept, also where it cannot be, which is refused."""
    assert TrainConfig("d", "o", batch_size=given).batch_size_for(images, processes) == size
