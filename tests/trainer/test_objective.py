"""What a training step minimises: the likelihood of images, and with a `label_weight` that of their labels too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import checkpoint, config_for_batches, rows, tiny
from torch import Tensor

import tarflow_fast as tff
from tarflow_fast.data import ImageData
from tarflow_fast.errors import ArgumentError
from tarflow_fast.trainer import train
from tarflow_fast.trainer.batches import Batches
from tarflow_fast.trainer.objective import objective, objective_with_labels

CPU = torch.device("cpu")


def model_of(classes: int, *, nvp: bool = True) -> tff.TarFlow:
    torch.manual_seed(0)
    model = tff.TarFlow(1, 8, 2, 64, 2, 1, nvp=nvp, num_classes=classes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model.var.uniform_(0.5, 2)
    return model


def passed(model: tff.TarFlow, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    z, _, log_det = model(x, y)
    return z, log_det


@pytest.mark.parametrize("nvp", [True, False])
@pytest.mark.parametrize("classes", [2, 5])
def test_second_term_is_that_of_log_prob(classes: int, nvp: bool) -> None:
    """L − λ E[log(1 + (n − 1) p(x | y′) / p(x | y))] / (T·D) is the likelihood's loss; no class has no second term."""
    model = model_of(classes, nvp=nvp)
    x = torch.randn(7, 1, 8, 8)
    y = torch.randint(classes, (7,))
    others = (y + 1) % classes
    y[3] = others[3] = -1
    loss, z, log_det = objective_with_labels(model, lambda x, y: passed(model, x, y), x, y, others, 3.0)
    known = y >= 0
    gap = model.log_prob(x[known], others[known]) - model.log_prob(x[known], y[known])
    plain = objective(model, lambda x, y: passed(model, x, y), x, y)
    second = torch.log1p((classes - 1) * gap.exp()).sum() / len(x) / 64
    torch.testing.assert_close(loss, plain.loss + 3 * second, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(z, plain.z)
    torch.testing.assert_close(log_det, plain.log_det)


def test_other_labels_are_uniform_and_the_same_for_any_number_of_processes() -> None:
    classes, size = 5, 4000
    data = ImageData(torch.zeros(size, 1, 2, 2, dtype=torch.uint8), torch.arange(size) % classes)
    config = config_for_batches(batch_size=size)
    batches = Batches(data, config, CPU, 0, 1)
    y = torch.arange(size) % classes
    y[::10] = -1
    others = batches.others(3, y)
    assert (others[y < 0] == -1).all()
    away = ((others - y) % classes)[y >= 0]
    counts = torch.bincount(away, minlength=classes)
    assert counts[0] == 0
    assert (counts[1:] - len(away) / 4).abs().max() < 6 * (len(away) * 3 / 16) ** 0.5
    assert not torch.equal(others, batches.others(4, y))
    halves = [Batches(data, config, CPU, rank, 2).others(3, part) for rank, part in enumerate(y.chunk(2))]
    assert torch.equal(torch.cat(halves), others)


def test_training_with_labels_tells_classes_apart(tmp_path: Path) -> None:
    """Classes that differ in one pixel by its noise are told apart far better by a model that learnt their labels."""
    labels = np.arange(120) % 3
    images = 128 + 40 * np.random.default_rng(0).standard_normal((120, 8, 8, 1))
    images[np.arange(120), labels, 0, 0] += 60
    np.savez(tmp_path / "data.npz", images=images.clip(0, 255).astype(np.uint8), labels=labels)
    data = tff.load_images(tmp_path / "data.npz")
    accuracy = {}
    for weight in (0.0, 60.0):
        config = tiny(str(tmp_path / "data.npz"), tmp_path / str(weight), epochs=10, lr=5e-3, log_every=1)
        model = train(replace(config, ema_decay=0.9, drop_label=0.0, label_weight=weight), progress=False)
        accuracy[weight] = tff.bayes_accuracy(model, data).accuracy
        assert checkpoint(tmp_path / str(weight))["config"]["label_weight"] == weight
    without, within = (rows(tmp_path / weight)[0] for weight in ("0.0", "60.0"))
    assert within["half_z2"] == pytest.approx(without["half_z2"], abs=1e-5)  # the first step is of the same images
    assert within["loss"] > without["loss"]
    assert accuracy[60.0] > accuracy[0.0] + 0.1


def test_one_class_has_no_other(tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", images=np.zeros((9, 8, 8, 1), np.uint8), labels=np.zeros(9, np.int64))
    with pytest.raises(ArgumentError, match=r"label_weight.*one class"):
        train(tiny(str(tmp_path / "one.npz"), tmp_path / "run", label_weight=1.0), progress=False)
    with pytest.raises(ArgumentError, match=r"label_weight.*unconditional"):
        tiny(str(tmp_path / "one.npz"), tmp_path / "run", label_weight=1.0, conditional=False)
