"""Numbers, flags and labels as people have them: numpy's, tensors without dimensions, 0 and 1, names of classes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from cases import random_images, random_latents, random_model

from tarflow_fast import ArgumentError, Sampler, TarFlow, TarFlowConfig, denoise
from tarflow_fast.checks import batch_labels, check_count, check_number, label_tensor
from tarflow_fast.evaluation import Noise
from tarflow_fast.images import grid
from tarflow_fast.scalars import check_flag, plain
from tarflow_fast.trainer import TrainConfig

CPU = torch.device("cpu")
THREES = [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor(3, dtype=torch.uint8)]
HALVES = [0.5, np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5), torch.tensor(0.5, dtype=torch.half)]
ONES = [True, 1, np.bool_(True), np.int64(1), np.array(True), torch.tensor(True), torch.tensor(1)]
NAMES = ("cat", "dog", "owl")


@pytest.mark.parametrize("value", [*THREES, *HALVES, *ONES], ids=repr)
def test_plain_is_what_python_has(value: Any) -> None:
    assert type(plain(value)) in (int, float, bool)
    assert plain(value) == value


@pytest.mark.parametrize(
    "value", [None, "3", [3], np.arange(3), torch.zeros(1), torch.zeros((), device="meta")], ids=repr
)
def test_plain_leaves_all_else(value: Any) -> None:
    assert plain(value) is value
    with pytest.raises(ArgumentError):
        check_count("n", value)
    with pytest.raises(ArgumentError):
        check_number("x", value)
    with pytest.raises(ArgumentError):
        check_flag("f", value)


def test_checks_give_pythons_own() -> None:
    assert all(type(check_count("n", three)) is int for three in THREES)
    assert all(type(check_number("x", value)) is float for value in [*THREES, *HALVES])
    assert all(check_flag("f", one) is True for one in ONES)
    for bad in (np.bool_(True), torch.tensor(True), 2.0, np.float32(3), np.array(-1), torch.tensor(0)):
        with pytest.raises(ArgumentError):
            check_count("n", bad)
    for bad in (np.float32("nan"), torch.tensor(torch.inf), np.bool_(False), torch.tensor(1j)):
        with pytest.raises(ArgumentError):
            check_number("x", bad)
    for bad in (2, 1.0, "1", np.float32(1), torch.tensor(2)):
        with pytest.raises(ArgumentError):
            check_flag("f", bad)


LABELS: list[tuple[Any, list[int]]] = [
    (np.arange(3), [0, 1, 2]),
    (np.array([2, -1], dtype=np.int8), [2, -1]),
    (np.uint8(2), [2]),
    (np.array(1), [1]),
    ([np.int64(1), 2], [1, 2]),
    ([torch.tensor(2), np.array(0), "owl"], [2, 0, 2]),
    ("dog", [1]),
    (["owl", "cat"], [2, 0]),
    (np.array(["owl", "cat"]), [2, 0]),
    (range(3), [0, 1, 2]),
    (torch.tensor([1, 0], dtype=torch.uint8), [1, 0]),
]


@pytest.mark.parametrize(("labels", "wanted"), LABELS, ids=repr)
def test_labels_of_every_kind(labels: Any, wanted: list[int]) -> None:
    found = label_tensor(labels, 3, class_names=NAMES)
    assert found is not None
    assert found.dtype == torch.int64
    assert found.tolist() == wanted


@pytest.mark.parametrize(
    "labels",
    [
        *("wolf", b"dog", ["cat", "cow"], np.array([1.0]), np.array([True]), np.eye(2, dtype=int), [1.0], [True], 3),
        *({1: 2}, np.array([3]), [None], np.array([], dtype=int), 2**70, [[1]], np.datetime64("2020")),
    ],
    ids=repr,
)
def test_other_labels_are_refused(labels: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^labels: "):
        label_tensor(labels, 3, class_names=NAMES)
    with pytest.raises(ArgumentError, match=r"^labels: expected integers, as this model records no names"):
        label_tensor("dog", 3)


@pytest.mark.parametrize("label", [2, np.int64(2), torch.tensor(2), np.array(2), "owl"], ids=repr)
def test_one_label_serves_a_batch(label: Any) -> None:
    found = batch_labels(label, 4, 3, CPU, class_names=NAMES)
    assert found is not None
    assert found.tolist() == [2] * 4
    with pytest.raises(ArgumentError, match="4 labels"):
        batch_labels([2], 4, 3, CPU)
    with pytest.raises(ArgumentError, match="4 labels"):
        batch_labels(np.array([2]), 4, 3, CPU)


@pytest.fixture
def model() -> TarFlow:
    model = random_model(num_classes=3)
    model.metadata = {"noise_std": 0.1, "class_names": list(NAMES)}
    return model


def test_sampling_takes_them_all(model: TarFlow) -> None:
    sampler = Sampler(model, compile=np.bool_(False))
    wanted = sampler.sample(
        3, 2, seed=3, first=3, guidance=0.5, annealed_guidance=True, denoise=True, denoise_scale=0.5
    )
    for three, half, one in zip(THREES[:6], HALVES, ONES[:6], strict=True):
        got = sampler.sample(
            three, np.array(["owl"]), seed=three, first=three, guidance=half, annealed_guidance=one, denoise=one,
            denoise_scale=half, batch_size=three, trajectory=one, progress=False,
        )  # fmt: skip
        assert torch.equal(got.images, wanted.images)
        assert got.trajectory is not None
    z = random_latents(model, 2)
    wanted = sampler.reverse(z, torch.tensor([0, 2]), 0.5, "ab", 0.5, True)
    got = sampler.reverse(z, ["cat", "owl"], np.float32(0.5), "ba", torch.tensor(0.5), 1, return_sequence=0)
    assert torch.equal(got, wanted)
    assert torch.equal(model.reverse(z, np.array([0, 2]), HALVES[4], "ab", HALVES[3], ONES[2]), wanted)
    Sampler(model, solver="adaptive", tol=np.float32(1e-3), threads=None).sample(1)


def test_densities_take_them_all(model: TarFlow) -> None:
    images, y = random_images(model, 2), torch.tensor([2, 2])
    for label in (2, np.int64(2), torch.tensor(2), "owl", np.array([2, 2]), ["owl", 2]):
        assert torch.equal(model.log_prob(images, label), model.log_prob(images, y))
        wanted = denoise(model, images, y, noise_std=0.5, scale=0.5)
        assert torch.equal(denoise(model, images, label, noise_std=HALVES[1], scale=HALVES[4]), wanted)


def test_what_is_kept_is_pythons_own() -> None:
    config = TarFlowConfig(
        np.int64(1), np.int32(8), torch.tensor(2), 64, 2, 1, nvp=np.int64(1), num_classes=np.array(0)
    )
    assert config == TarFlowConfig(1, 8, 2, 64, 2, 1, True, 0)
    assert json.loads(json.dumps(config.to_dict()))["nvp"] is True
    assert TarFlow(1, 8, 2, 64, 2, 1, 0).config.nvp is False
    noise = Noise("gaussian", np.float32(0.5), np.int64(3))
    run = TrainConfig("data", "out", epochs=np.int64(3), lr=np.float32(0.5), nvp=1, flip=np.bool_(True))
    json.dumps([noise.__dict__, run.to_dict()])
    assert run.flip is True
    assert grid(torch.zeros(4, 1, 2, 2), np.int64(2), torch.tensor(1), np.array(2)).shape == (11, 11, 1)
