"""`Sampler.stream`: images as they are drawn, however many; and what is refused before anything is drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import random_model
from tolerances import BATCH, assert_close

from tarflow_fast.errors import ArgumentError, NonFiniteError, OutOfMemoryError
from tarflow_fast.sampling import memory
from tarflow_fast.sampling.report import Samples
from tarflow_fast.sampling.sampler import Sampler

SAMPLER = Sampler(random_model(num_classes=3, img_size=4))


@pytest.mark.parametrize(
    "options", [{}, {"guidance": 1.0}, {"denoise": True, "noise_std": 0.1, "trajectory": True}], ids=str
)
def test_parts_are_the_whole(options: dict[str, Any]) -> None:
    whole = SAMPLER.sample(7, [0, 1, 2], batch_size=3, **options)
    parts = list(SAMPLER.stream(7, [0, 1, 2], batch_size=3, **options))
    assert [len(part.images) for part in parts] == [3, 3, 1]
    assert_close(torch.cat([part.images for part in parts]), whole.images, BATCH)
    assert whole.labels is not None
    assert torch.cat([part.labels for part in parts if part.labels is not None]).tolist() == whole.labels.tolist()
    if whole.log_prob is not None:
        assert_close(torch.cat([part.log_prob for part in parts if part.log_prob is not None]), whole.log_prob, BATCH)
    if whole.trajectory is not None:
        for k, frames in enumerate(whole.trajectory):
            assert_close(torch.cat([part.trajectory[k] for part in parts if part.trajectory]), frames, BATCH)
    assert whole.report.tokens == sum(part.report.tokens for part in parts) == 7 * 2 * 4
    assert [block.evaluations for block in whole.report.blocks] == [
        sum(part.report.blocks[k].evaluations for part in parts) for k in range(2)
    ]
    assert whole.images.device.type == "cpu"


def test_any_number_of_images_begins_at_once() -> None:
    stream = SAMPLER.stream(2**62, [0, 1], first=2**61, batch_size=2)
    part = next(stream)
    assert_close(part.images, SAMPLER.sample(2, [0, 1], first=2**61).images, BATCH)
    stream.close()


def test_what_was_drawn_before_a_failure_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    invert, calls = Sampler._invert, []

    def fail(self: Sampler, *arguments: Any) -> Any:
        part = invert(self, *arguments)
        calls.append(1)
        if len(calls) == 3:
            part.failures[1] = (0, 2)
        return part

    monkeypatch.setattr(Sampler, "_invert", fail)
    drawn: list[Samples] = []
    with pytest.raises(NonFiniteError) as caught:
        drawn.extend(SAMPLER.stream(10, first=100, batch_size=3))
    assert [len(part.images) for part in drawn] == [3, 3]
    assert caught.value.sample == 107


def test_memory_that_cannot_hold_the_images_is_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutOfMemoryError, match=r"^n: .*stream\(\) holds one batch"):
        SAMPLER.sample(10**15)
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**20)
    with pytest.raises(OutOfMemoryError, match=r"^n: "):
        SAMPLER.sample(20_000)
    with pytest.raises(OutOfMemoryError, match=r"^n: "):
        SAMPLER.sample(6_000, trajectory=True)


@pytest.mark.parametrize(
    "options",
    [
        {"n": 2**63},
        {"seed": 2**64},
        {"first": 2**70},
        {"first": 2**63 - 1, "n": 2},
        {"guidance": 1e4, "labels": 0},
        {"attn_temp": 1e9, "guidance": 1.0},
        {"batch_size": 2**40},
        {"noise_std": 1e30, "denoise": True},
        {"denoise_scale": 1e30, "denoise": True, "noise_std": 0.1},
        {"denoise": "yes"},
        {"denoise": 2},
        {"denoise": None},
        {"trajectory": "no"},
        {"trajectory": 0.0},
        {"progress": "yes"},
        {"progress": []},
        {"noise_std": 0.1},
        {"denoise_scale": 2.0},
        {"attn_temp": 2.0},
        {"guide_what": "a"},
        {"annealed_guidance": True},
        {"guidance": 2.0},
        {"guidance": 2.0, "labels": -1},
        {"guidance": 2.0, "labels": [-1, -3]},
    ],
    ids=str,
)
def test_refused_before_anything_is_drawn(options: dict[str, Any]) -> None:
    name = next(iter(options))
    for call in (SAMPLER.sample, SAMPLER.stream):
        with pytest.raises(ArgumentError, match=f"^{name}: expected .*, got "):
            call(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"denoise": 1, "noise_std": 0.1},
        {"denoise": 0, "trajectory": 1, "progress": 0},
        {"guidance": 2.0, "attn_temp": 2.0},
        {"guidance": 2.0, "labels": [-1, 0]},
        {"seed": 2**64 - 1, "first": 2**63 - 3},
    ],
    ids=str,
)
def test_taken(options: dict[str, Any]) -> None:
    assert torch.isfinite(SAMPLER.sample(2, **options).images).all()


@pytest.mark.parametrize("threads", [20000, 2**70])
def test_threads_that_no_machine_has(threads: int) -> None:
    with pytest.raises(ArgumentError, match=r"^threads: expected an integer >= 1 and <= "):
        Sampler(random_model(), backend="cpu", threads=threads)


def test_tolerances_that_hold_nothing_back() -> None:
    with pytest.raises(ArgumentError, match=r"^tol: "):
        Sampler(random_model(), solver="adaptive", tol=1e10)
