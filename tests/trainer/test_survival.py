"""Training survives kills and full disks: after the same command again, the files are an undisturbed run's."""

from __future__ import annotations

import errno
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import (
    Child,
    assert_same_run,
    checkpoint,
    flags,
    fork,
    limit_files,
    pixels,
    rows,
    tiny,
    train_command,
    write_pictures,
)

import tarflow_fast as tff
from tarflow_fast.errors import CheckpointError, NonFiniteError, TrainingDiverged
from tarflow_fast.trainer import TrainConfig, train
from tarflow_fast.trainer.folder import LOCK
from tarflow_fast.trainer.loop import _Run
from tarflow_fast.trainer.metrics import MetricsLog
from tarflow_fast.trainer.state import TrainState

if sys.platform == "win32":
    pytest.skip("POSIX", allow_module_level=True)


FILES = {"checkpoint.pt", "model.safetensors", "train.csv", "eval.csv", "samples"}
WRITES = ("replace", "unlink", "fsync", "open", "mkdir")  # of os, at which a process may be killed


def with_all_files(data: str, out: Path, **changes: Any) -> TrainConfig:
    return tiny(data, out, **{"eval_data": data, "eval_every": 3, "eval_images": 5, "sample_every": 4, **changes})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures.npz")


@pytest.fixture(scope="module")
def whole(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(with_all_files(data, out, sample_rows=1), progress=False)
    assert set(os.listdir(out)) == FILES
    return out


def again(config: TrainConfig, around: Callable[..., Any] = lambda action: action) -> Child:
    """The same command, which goes on where a run was."""
    out = Path(config.out)
    resume = ["--resume"] if (out / "checkpoint.pt").exists() or (out / LOCK).exists() else []
    return fork(around(train_command(*flags(config), *resume)))


def assert_whole(whole: Path, out: Path) -> None:
    assert_same_run(whole, out)
    assert pixels(whole / "samples") == pixels(out / "samples")
    assert set(os.listdir(out)) == FILES


def killing_at(count: int) -> Callable[..., Any]:
    """Kills the process when it writes for so many times, before or after the call."""

    def around(action: Callable[[], object]) -> Callable[[], object]:
        def act() -> None:
            calls = 0

            def counted(plain: Callable[..., Any]) -> Callable[..., Any]:
                def call(*arguments: Any, **named: Any) -> Any:
                    nonlocal calls
                    calls += 1
                    if calls == count:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return plain(*arguments, **named)

                return call

            for name in WRITES:
                setattr(os, name, counted(getattr(os, name)))
            action()

        return act

    return around


def kill_and_resume(data: str, whole: Path, tmp_path: Path, counts: list[int]) -> None:
    for count in counts:
        config = with_all_files(data, tmp_path / str(count), sample_rows=1, checkpoint_every=5)
        killed = again(config, killing_at(count))
        if killed.wait() == 0:
            return  # it does not write so often
        assert killed.code == -signal.SIGKILL, killed.text
        resumed = again(config)
        assert resumed.wait() == 0, resumed.text
        assert_whole(whole, Path(config.out))


def test_killed_while_it_writes(data: str, whole: Path, tmp_path: Path) -> None:
    kill_and_resume(data, whole, tmp_path, [2, 9, 40])


@pytest.mark.slow
@pytest.mark.parametrize("part", [1, 2, 3, 4])
def test_killed_at_any_write(data: str, whole: Path, tmp_path: Path, part: int) -> None:
    kill_and_resume(data, whole, tmp_path, list(range(part, 500, 4)))


def kill_at_random(data: str, whole: Path, tmp_path: Path, kills: int, seed: int = 0) -> None:
    """Run after run, each killed again and again, at moments of all its time, until it ends."""
    started = time.monotonic()
    undisturbed = again(with_all_files(data, tmp_path / "undisturbed", sample_rows=1))
    assert undisturbed.wait() == 0, undisturbed.text
    seconds = time.monotonic() - started
    rng, done, runs = random.Random(seed), 0, 0
    while done < kills:
        config = with_all_files(data, tmp_path / str(runs), sample_rows=1, checkpoint_every=2)
        code = -1
        while code:
            child = again(config)
            if done < kills:
                time.sleep(rng.uniform(0, seconds))
                child.kill()
            code = child.wait()
            assert code in (0, -signal.SIGKILL), child.text
            done += code != 0
        assert_whole(whole, Path(config.out))
        runs += 1


def test_killed_at_a_few_moments(data: str, whole: Path, tmp_path: Path) -> None:
    kill_at_random(data, whole, tmp_path, 2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_killed_at_a_hundred_moments(data: str, whole: Path, tmp_path: Path, seed: int) -> None:
    kill_at_random(data, whole, tmp_path, 25, seed)


@pytest.mark.parametrize("gone", ["lost", "stale", "broken"])
def test_model_is_made_from_the_checkpoint(data: str, whole: Path, tmp_path: Path, gone: str) -> None:
    """A run that died between the two, or whose model somebody has lost."""
    out = tmp_path / "run"
    config = with_all_files(data, out, sample_rows=1)
    train(config, progress=False)
    model = out / "model.safetensors"
    if gone == "lost":
        model.unlink()
    elif gone == "stale":
        average = tff.load(model)
        with torch.no_grad():
            average.blocks[0].pos_embed += 1e-7
        tff.save(average, model)
    else:
        model.write_bytes(model.read_bytes()[:-8])
    train(config, resume=True, progress=False)
    assert_whole(whole, out)


# --- full disks ------------------------------------------------------------------------------------------------------


def fill_and_resume(data: str, whole: Path, tmp_path: Path, sizes: list[int]) -> None:
    for size in sizes:
        out, victim = tmp_path / str(size), tmp_path / "victim"
        victim.write_text("mine")
        out.mkdir()
        for name in ("checkpoint.pt.partial", "model.safetensors.partial"):
            (out / name).symlink_to(victim)
        config = with_all_files(data, out, sample_rows=1, checkpoint_every=4)
        full = again(config, lambda action, size=size: limit_files(size, action))
        assert full.wait() == 1, full.text
        last = full.text.splitlines()[-1]
        assert last.startswith(f"Error: {out}/"), full.text
        assert last.endswith(": File too large"), full.text
        assert "Traceback" not in full.text
        assert not {name for name in os.listdir(out) if "tarflow" in name}
        if (out / "checkpoint.pt").exists():
            assert checkpoint(out)["step"] in (0, 4, 8, 12)
        resumed = again(config)
        assert resumed.wait() == 0, resumed.text
        assert victim.read_text() == "mine"
        for name in ("checkpoint.pt.partial", "model.safetensors.partial"):
            (out / name).unlink()
        assert_whole(whole, out)


def sizes_of_disk(whole: Path, count: int) -> list[int]:
    """From nothing to what the checkpoint takes, dense where other files end."""
    largest = (whole / "checkpoint.pt").stat().st_size
    rng = random.Random(0)
    return [0, 100, largest - 1][:count] + [rng.randrange(largest) for _ in range(count - 3)]


def test_full_disk(data: str, whole: Path, tmp_path: Path) -> None:
    fill_and_resume(data, whole, tmp_path, sizes_of_disk(whole, 3))


@pytest.mark.slow
def test_disks_that_fill_at_twenty_sizes(data: str, whole: Path, tmp_path: Path) -> None:
    fill_and_resume(data, whole, tmp_path, sizes_of_disk(whole, 20))


def test_full_disk_is_told_as_such(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a checkpoint, of which the zip writer would tell something else; the old one stays."""
    config = tiny(data, tmp_path / "run", checkpoint_every=5)
    plain, saved = TrainState.save, []

    def save(state: TrainState, path: Path, *rest: Any) -> None:
        saved.append(state.step)
        with monkeypatch.context() as patch:
            if len(saved) == 2:
                patch.setattr("tarflow_fast.checkpoints.torch_files._Sink.write", full)
            plain(state, path, *rest)

    def full(sink: Any, data: bytes) -> int:
        if sink.file.tell() > 300_000 and sink.error is None:
            sink.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        elif sink.error is None:
            sink.file.write(data)
        return len(data)

    monkeypatch.setattr(TrainState, "save", save)
    with pytest.raises(OSError, match="No space left on device") as raised:
        train(config, progress=False)
    assert raised.value.filename == str(tmp_path / "run" / "checkpoint.pt")
    assert saved == [0, 5]
    assert checkpoint(tmp_path / "run")["step"] == 0
    assert set(os.listdir(tmp_path / "run")) == {"checkpoint.pt", "model.safetensors", "train.csv"}


def test_row_of_metrics_is_whole_or_not_there(tmp_path: Path) -> None:
    def act() -> None:
        log = MetricsLog(tmp_path)
        log.write("train", 1, {"loss": 1.0})
        try:
            limit_files((tmp_path / "train.csv").stat().st_size + 3, lambda: log.write("train", 2, {"loss": 2.0}))()
        except OSError as error:
            print(error)

    child = fork(act)
    assert child.wait() == 0
    assert "train.csv" in child.text
    assert rows(tmp_path) == [{"step": 1, "loss": 1}]


# --- what goes wrong on the way --------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [NonFiniteError(0, 1, 2), tff.OutOfMemoryError("too many")])
def test_training_goes_on_without_a_picture(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: Exception
) -> None:
    def fail(*_: Any, **how: Any) -> None:
        assert how["on_nonfinite"] == "redraw"
        raise error

    monkeypatch.setattr("tarflow_fast.sampling.sampler.Sampler.sample", fail)
    train(tiny(data, tmp_path, sample_every=6), progress=False)
    said = capfd.readouterr().err.splitlines()
    assert said == [f"step {step}: no grid of samples: {error}" for step in (6, 12)]
    assert checkpoint(tmp_path)["step"] == 12


def test_training_goes_on_without_a_density(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise tff.TarFlowError("the density of image 3 is not finite")

    monkeypatch.setattr("tarflow_fast.trainer.outputs.bits_per_dim", fail)
    train(tiny(data, tmp_path, eval_data=data), progress=False)
    assert "step 12: no bits/dim of held-out images: the density of image 3" in capfd.readouterr().err
    assert not (tmp_path / "eval.csv").exists()


def test_weights_that_broke_do_not_take_the_place_of_sound_ones(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = _Run._step

    def step(run: _Run) -> None:
        plain(run)
        if run.state.step == 6:
            with torch.no_grad():
                next(run.state.model.parameters()).view(-1)[0] = float("inf")

    monkeypatch.setattr(_Run, "_step", step)
    with pytest.raises(TrainingDiverged, match="weights are not finite by step 6"):
        train(tiny(data, tmp_path, checkpoint_every=3, log_every=100), progress=False)
    assert checkpoint(tmp_path)["step"] == 3


def break_moments(content: dict[str, Any]) -> None:
    content["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)


def break_weights(content: dict[str, Any]) -> None:
    content["ema"]["var"][0] = float("nan")


@pytest.mark.parametrize(
    "change",
    [
        break_moments,
        break_weights,
        lambda content: content.pop("config"),
        lambda content: content["model"].pop("var"),
        lambda content: content["ema"].update(var=3),
        lambda content: content.update(step=-1),
        lambda content: content.update(optimizer={}),
        lambda content: content.update(sums=torch.zeros(9)),
        lambda content: content["config"].update(lr="high"),
        lambda content: content["config"].update(future=1),
    ],
)
def test_checkpoints_that_are_not_whole(data: str, whole: Path, tmp_path: Path, change: Callable[..., Any]) -> None:
    content = checkpoint(whole)
    change(content)
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: "):
        train(with_all_files(data, tmp_path, sample_rows=1), resume=True, progress=False)
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_checkpoints_of_before_are_continued(data: str, whole: Path, tmp_path: Path) -> None:
    """Of a version that recorded neither threads nor metadata."""
    config = with_all_files(data, tmp_path, sample_rows=1)
    content = checkpoint(whole)
    del content["metadata"], content["config"]["threads"]
    torch.save(content, tmp_path / "checkpoint.pt")
    model = train(replace(config, epochs=4), resume=True, progress=False)
    assert model.metadata["steps"] == 16
