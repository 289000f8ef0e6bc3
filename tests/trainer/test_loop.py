"""Training: the loop against a plain one, exact continuation, two processes against one, and its files."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from runs import (
    CLASSES,
    STEPS,
    assert_same,
    assert_same_run,
    checkpoint,
    command,
    flags,
    free_port,
    one_thread,
    rows,
    tiny,
    write_pictures,
)
from torch import Tensor

import tarflow_fast as tff
from tarflow_fast.cli import main
from tarflow_fast.data import ImageData, load_images
from tarflow_fast.errors import ArgumentError, CheckpointError, TrainingDiverged, TrainingStopped
from tarflow_fast.evaluation import Noise, bits_per_dim
from tarflow_fast.models.attention import causal_attention
from tarflow_fast.trainer import TrainConfig, train
from tarflow_fast.trainer.batches import Batches
from tarflow_fast.trainer.loop import _Run
from tarflow_fast.trainer.metrics import MetricsLog

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures.npz")


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


# --- batches ---------------------------------------------------------------------------------------------------------


def numbered(n: int = 20, size: int = 4) -> ImageData:
    """Image i is i everywhere but for its left column, which is 100 + i; its label is i."""
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, size, size).clone()
    images[..., 0] += 100
    return ImageData(images, torch.arange(n))


def values(x: Tensor) -> Tensor:
    """The 8-bit images under a little Gaussian noise."""
    return ((x + 1) * 127.5).round().long()


def config_for_batches(**changes: Any) -> TrainConfig:
    return TrainConfig("-", "-", **{"batch_size": 8, "noise_std": 1e-4, "drop_label": 0.0, **changes})


def test_every_epoch_is_another_permutation() -> None:
    batches = Batches(numbered(), config_for_batches(), CPU, 0, 1)
    assert batches.steps_per_epoch == 2
    epochs = []
    for epoch in range(3):
        labels = []
        for step in (2 * epoch, 2 * epoch + 1):
            x, y = batches(step)
            assert y is not None
            assert torch.equal(values(x)[:, 0, 0, 1], y)  # the label belongs to the image
            labels += y.tolist()
        assert len(set(labels)) == len(labels) == 16
        epochs.append(labels)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("noise_type", ["gaussian", "uniform"])
def test_batch_depends_on_seed_and_step_alone(noise_type: str) -> None:
    config = config_for_batches(noise_type=noise_type, noise_std=0.1, drop_label=0.5, flip=True)
    batches, others = (Batches(numbered(), config, CPU, 0, 1) for _ in range(2))
    for step in range(3):
        others(step)
    torch.manual_seed(99)
    for step in (1, 0, 5):
        assert_same(batches(step), others(step))
    shares = [Batches(numbered(), config, CPU, rank, 4)(3) for rank in range(4)]
    x, y = batches(3)
    assert y is not None
    assert torch.equal(torch.cat([share[0] for share in shares]), x)
    assert torch.equal(torch.cat([share[1] for share in shares if share[1] is not None]), y)
    other_seed, _ = Batches(numbered(), replace(config, seed=1), CPU, 0, 1)(3)
    assert not torch.equal(other_seed, x)


def test_noise_is_new_at_every_step() -> None:
    """The same black image throughout: the noise of a step is that of no other, nor of another image."""
    data = ImageData(torch.zeros(16, 1, 16, 16, dtype=torch.uint8), torch.zeros(16, dtype=torch.int64))
    batches = Batches(data, config_for_batches(noise_std=1.0), CPU, 0, 1)
    noise = torch.cat([batches(step)[0] for step in range(4)]).flatten(1) + 1  # 32 images
    correlation = noise @ noise.T / noise.shape[1]
    assert float((correlation - torch.eye(32)).abs().max()) < 0.5


def test_noise() -> None:
    """Gaussian: (x − (v/127.5 − 1))/σ ~ N(0, 1). Uniform: 128 (x + 1) − v ~ U[0, 1), so that v can be read off x."""
    data = numbered(64, 16)
    order = Batches(data, config_for_batches(batch_size=64), CPU, 0, 1)
    x, _ = Batches(data, config_for_batches(batch_size=64, noise_std=0.2), CPU, 0, 1)(0)
    v = values(order(0)[0])
    noise = (x - (v / 127.5 - 1)) / 0.2
    assert abs(float(noise.mean())) < 0.03
    assert abs(float(noise.std()) - 1) < 0.03
    assert abs(float(noise.pow(4).mean()) - 3) < 0.2
    x, _ = Batches(data, config_for_batches(batch_size=64, noise_type="uniform"), CPU, 0, 1)(0)
    assert torch.equal(((x + 1) * 128).floor().long(), v)
    u = (x + 1) * 128 - v
    assert abs(float(u.mean()) - 0.5) < 0.01
    assert abs(float(u.var()) - 1 / 12) < 0.005


def test_dropped_labels_and_mirrored_images() -> None:
    data = numbered(100)
    plain = Batches(data, config_for_batches(batch_size=100), CPU, 0, 1)
    batches = Batches(data, config_for_batches(batch_size=100, drop_label=0.3, flip=True), CPU, 0, 1)
    dropped, mirrored = 0, 0
    for step in range(10):
        (x, y), (x_plain, y_plain) = batches(step), plain(step)
        assert y is not None
        assert y_plain is not None
        assert torch.equal(y[y >= 0], y_plain[y >= 0])
        dropped += int((y == -1).sum())
        v, v_plain = values(x), values(x_plain)
        flipped = (v != v_plain).flatten(1).any(1)
        assert torch.equal(v[flipped], v_plain[flipped].flip(-1))
        mirrored += int(flipped.sum())
    assert abs(dropped - 300) < 60
    assert abs(mirrored - 500) < 60


def test_batches_that_cannot_be() -> None:
    with pytest.raises(ArgumentError, match="batch_size: expected at most 20"):
        Batches(numbered(), config_for_batches(batch_size=21), CPU, 0, 1)
    with pytest.raises(ArgumentError, match="multiple of the 3 processes"):
        Batches(numbered(), config_for_batches(), CPU, 0, 3)
    with pytest.raises(ArgumentError, match="conditional"):
        Batches(ImageData(numbered().images), config_for_batches(), CPU, 0, 1)
    _, y = Batches(ImageData(numbered().images), config_for_batches(conditional=False), CPU, 0, 1)(0)
    assert y is None


# --- schedule and configuration --------------------------------------------------------------------------------------


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


# --- the loop --------------------------------------------------------------------------------------------------------


def plain_training(config: TrainConfig, steps: int) -> tuple[tff.TarFlow, dict[str, Tensor], list[float]]:
    """The same run as the equations say it: model, moving average of the weights, losses."""
    data = load_images(config.data)
    batches = Batches(data, config, CPU, 0, 1)
    torch.manual_seed(config.seed)
    model = tff.TarFlow(1, 8, 2, 64, 2, 1, nvp=config.nvp, num_classes=CLASSES)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), weight_decay=config.weight_decay, foreach=False
    )
    average: dict[str, Tensor] = {}
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = config.learning_rate(step, STEPS)
        x, y = batches(step)
        z, _, log_det = model(x, y)
        loss = 0.5 * z.square().mean() - log_det.mean()
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
        if config.clip_norm is not None and norm > config.clip_norm:
            for p in model.parameters():
                assert p.grad is not None
                p.grad.mul_(config.clip_norm / norm)
        optimizer.step()
        if not config.nvp:
            model.var = 0.9 * model.var + 0.1 * z.detach().square().mean(0)
        decay = min(config.ema_decay, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            old = average.get(name, value) if name != "var" else value
            average[name] = decay * old + (1 - decay) * value
        losses.append(loss.item())
    return model, average, losses


@pytest.mark.parametrize("tokens", [1, 2, 49])
def test_gradients_of_bf16_attention(tokens: int) -> None:
    """bf16 training on a CPU: at most twice the error of torch's fused kernel, forward and backward."""

    def both(backend: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        out = causal_attention(*leaves, backend)
        out.backward(weight.to(dtype))
        return [out.detach().double(), *(x.grad.double() for x in leaves if x.grad is not None)]

    inputs = [torch.randn(2, tokens, 2, 64).bfloat16() for _ in range(3)]
    weight = torch.randn(2, tokens, 2, 64).bfloat16()
    right, fused, ours = both("sdpa", torch.float64), both("sdpa", torch.bfloat16), both("auto", torch.bfloat16)
    for a, b, c in zip(ours, fused, right, strict=True):
        assert float((a - c).abs().max()) <= 2 * float((b - c).abs().max()) + 1e-2


@pytest.mark.parametrize("nvp", [True, False])
def test_training_is_the_plain_loop(pictures: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nvp: bool) -> None:
    config = tiny(pictures, tmp_path / "run", nvp=nvp, clip_norm=0.5, ema_decay=0.4, log_every=1, weight_decay=0.1)
    stop_at(monkeypatch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(TrainingStopped):
        train(config, progress=False)
    model, average, losses = plain_training(config, 6)
    content = checkpoint(tmp_path / "run")
    assert_same(dict(content["model"]), dict(model.state_dict()), atol=2e-5, rtol=1e-4)
    assert_same(dict(content["ema"]), average, atol=2e-5, rtol=1e-4)
    logged = rows(tmp_path / "run")
    assert [row["loss"] for row in logged] == pytest.approx(losses, abs=1e-5)
    assert [row["half_z2"] - row["log_det"] for row in logged] == pytest.approx(losses, abs=1e-5)
    assert logged[0]["epoch"] == pytest.approx(1 / 4)
    assert (content["ema"]["var"] == 1).all() == nvp


def test_rows_are_means(pictures: str, tmp_path: Path) -> None:
    for every in (1, 5):
        train(tiny(pictures, tmp_path / str(every), log_every=every), progress=False)
    single, means = rows(tmp_path / "1"), rows(tmp_path / "5")
    assert [row["step"] for row in means] == [5, 10, 12]
    for start, row in zip((0, 5, 10), means, strict=True):
        part = single[start : int(row["step"])]
        for name in ("loss", "half_z2", "log_det", "grad_norm"):
            assert row[name] == pytest.approx(sum(r[name] for r in part) / len(part), rel=1e-4)


def test_training_learns(pictures: str, tmp_path: Path) -> None:
    """A model of 70 images comes to know them better than the identity that it starts from."""
    train(tiny(pictures, tmp_path, epochs=8, lr=1e-2, ema_decay=0.9, eval_data=pictures), progress=False)
    data = load_images(pictures)
    start = bits_per_dim(tff.TarFlow(1, 8, 2, 64, 2, 1), data.images, noise=Noise("gaussian", 0.05))
    assert rows(tmp_path, "eval")[-1]["bits_per_dim"] < start.mean - 0.2


# --- continuing ------------------------------------------------------------------------------------------------------


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


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("nvp", [True, False])
def test_two_processes_are_one(pictures: str, tmp_path: Path, nvp: bool) -> None:
    """torchrun with two processes over gloo: the weights and metrics of one process, up to rounding; then a signal."""
    one, two = tmp_path / "one", tmp_path / "two"
    changes: dict[str, Any] = {"nvp": nvp, "eval_data": pictures, "eval_every": 6, "clip_norm": 0.5}
    train(tiny(pictures, one, **changes), progress=False)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    options = [*flags(tiny(pictures, two, **changes)), "--threads", "1"]
    done = subprocess.run(
        [*torchrun, "-m", "tarflow_fast", "train", *options], env=one_thread(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(two / "model.safetensors")]
    a, b = checkpoint(one), checkpoint(two)
    for name in ("model", "ema"):
        assert_same(dict(a[name]), dict(b[name]), name, atol=2e-5, rtol=1e-4)
    for kind in ("train", "eval"):
        for x, y in zip(rows(one, kind), rows(two, kind), strict=True):
            assert {**x, "seconds": 0} == pytest.approx({**y, "seconds": 0}, rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_one_process_reads_for_all(tmp_path: Path) -> None:
    """Two processes of a machine train on a folder of pictures as one does; one reads, and its file is gone."""
    rng = np.random.default_rng(0)
    for i in range(60):
        path = tmp_path / "data" / ("train" if i < 40 else "val") / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    (tmp_path / "cache").mkdir()
    data, changes = str(tmp_path / "data"), {"img_size": 8, "cache": str(tmp_path / "cache"), "epochs": 2}
    config = tiny(data, tmp_path / "one", eval_data=data, **changes)
    train(config, progress=False)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    options = [*flags(replace(config, out=str(tmp_path / "two"))), "--threads", "1"]
    done = subprocess.run(
        [*torchrun, "-m", "tarflow_fast", "train", *options], env=one_thread(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("is taken for the test half") == 1
    a, b = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    assert a["fingerprint"] == b["fingerprint"]
    assert_same(dict(a["model"]), dict(b["model"]), atol=2e-5, rtol=1e-4)
    assert not list((tmp_path / "cache").iterdir())
    (tmp_path / "data" / "train" / "a" / "0.png").write_text("broken")
    torchrun[-1] = free_port()
    done = subprocess.run(
        [*torchrun, "-m", "tarflow_fast", "train", *options, "--out", str(tmp_path / "three")],
        env=one_thread(),
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "0.png': not a whole picture" in done.stderr
    assert not list((tmp_path / "cache").iterdir())


# --- files -----------------------------------------------------------------------------------------------------------


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


# --- what does not go together ---------------------------------------------------------------------------------------


def test_held_out_images_must_fit(pictures: str, tmp_path: Path) -> None:
    images = np.zeros((4, 8, 8), np.uint8)
    for arrays, message in (
        ({"images": images[:, :4, :4], "labels": np.zeros(4, int)}, "images of shape"),
        ({"images": images, "labels": np.array(["cat", "cow"] * 2)}, "classes that the model knows"),
        ({"images": images}, "labels of 3 classes"),
        ({"images": images, "labels": np.full(4, 3)}, "labels of 3 classes"),
    ):
        path = tmp_path / "held_out.npz"
        np.savez(path, **arrays)
        with pytest.raises(ArgumentError, match=f"eval_data: expected {message}"):
            train(tiny(pictures, tmp_path / "run", eval_data=str(path)), progress=False)
    with pytest.raises(ArgumentError, match="patch_size"):
        train(tiny(pictures, tmp_path / "run", patch_size=3), progress=False)
    assert not (tmp_path / "run").exists()


def test_held_out_classes_are_found_by_name(pictures: str, tmp_path: Path) -> None:
    """A class less and another order, also where the names were replaced."""
    data = load_images(pictures)
    assert data.labels is not None
    owls_and_cats = data.labels != 1
    images, labels = data.images[owls_and_cats, 0].numpy(), data.labels[owls_and_cats].numpy()
    path = tmp_path / "held_out.npz"
    found = []
    for names, number in ((None, {0: 0, 2: 2}), (["owl", "cat"], {0: 1, 2: 0}), (["owl", "cat"], {0: 1, 2: 0})):
        named = {} if names is None else {"class_names": np.array(names)}
        np.savez(path, images=images, labels=[number[label] for label in labels.tolist()], **named)
        changes = {"class_names": ("x", "y", "z")} if len(found) == 2 else {}
        out = tmp_path / str(len(found))
        train(tiny(pictures, out, epochs=1, eval_data=str(path), **changes), progress=False)
        found.append(rows(out, "eval"))
    assert found[0] == found[1] == found[2]


def test_names_that_permute_the_datas_own(pictures: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="class_names: expected names in the order of the data's own"):
        train(tiny(pictures, tmp_path / "run", class_names=("dog", "cat", "owl")), progress=False)


def test_labels_that_start_anywhere_become_names(pictures: str, tmp_path: Path) -> None:
    data = load_images(pictures)
    assert data.labels is not None
    path = tmp_path / "x.npz"
    np.savez(path, images=data.images[:, 0].numpy(), labels=data.labels.numpy() * 2 + 1)
    model = train(tiny(str(path), tmp_path / "run", epochs=1, eval_data=str(path)), progress=False)
    assert model.config.num_classes == 3
    assert model.metadata["class_names"] == ["1", "3", "5"]


def test_latents_are_learnt_as_they_are(tmp_path: Path) -> None:
    latents = np.random.default_rng(0).normal(size=(40, 4, 8, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", latents)
    changes: dict[str, Any] = {"conditional": False, "noise_std": 1e-5, "epochs": 1}
    config = tiny(str(tmp_path / "x.npy"), tmp_path / "run", eval_data=str(tmp_path / "x.npy"), **changes)
    model = train(config, progress=False)
    assert (model.config.in_channels, model.metadata["values"]) == (4, "raw")
    x, _ = Batches(load_images(config.data), config, CPU, 0, 1)(0)
    assert all(np.abs(latents - image).max(axis=(1, 2, 3)).min() < 1e-3 for image in x.numpy())
    assert math.isfinite(rows(tmp_path / "run", "eval")[-1]["bits_per_dim"])
    for change, named in (({"noise_type": "uniform"}, "noise_type"), ({"sample_every": 1}, "sample_every")):
        with pytest.raises(ArgumentError, match=named):
            train(replace(config, out=str(tmp_path / "other"), **change), progress=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["tpu", "mps", "", "cuda"])
def test_devices_that_are_not_there(pictures: str, tmp_path: Path, device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ArgumentError, match="device"):
        train(tiny(pictures, tmp_path / "run", device=device), progress=False)


# --- the command -----------------------------------------------------------------------------------------------------


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
