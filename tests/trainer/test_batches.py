"""Batches: the order of images, their noise, dropped labels, mirrored images."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from runs import (
    assert_same,
    config_for_batches,
)
from torch import Tensor

from tarflow_fast.data import ImageData
from tarflow_fast.errors import ArgumentError
from tarflow_fast.trainer.batches import Batches

CPU = torch.device("cpu")


def numbered(n: int = 20, size: int = 4) -> ImageData:
    """Image i is i everywhere but for its left column, which is 100 + i; its label is i."""
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, size, size).clone()
    images[..., 0] += 100
    return ImageData(images, torch.arange(n))


def values(x: Tensor) -> Tensor:
    """The 8-bit images under a little Gaussian noise."""
    return ((x + 1) * 127.5).round().long()


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
