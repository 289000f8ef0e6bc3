"""The loop: it is the plain one, in one process or several, and data that it cannot have are refused."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import (
    CLASSES,
    STEPS,
    assert_same,
    checkpoint,
    flags,
    free_port,
    one_thread,
    rows,
    stop_at,
    tiny,
)
from torch import Tensor

import tarflow_fast as tff
from tarflow_fast.data import load_images
from tarflow_fast.errors import ArgumentError, TrainingStopped
from tarflow_fast.evaluation import Noise, bits_per_dim
from tarflow_fast.models.attention import causal_attention
from tarflow_fast.trainer import TrainConfig, train
from tarflow_fast.trainer.batches import Batches

CPU = torch.device("cpu")


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
