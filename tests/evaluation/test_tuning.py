"""Tuning: each point is the FID of what the sampler draws there, from the same noise."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import random_model
from PIL import Image
from torch import Tensor

import tarflow_fast as tff
from tarflow_fast.errors import ArgumentError, BackendError
from tarflow_fast.evaluation import Gaussian, TuningPoint, feature_sums, frechet_distance, save_curve, tune
from tarflow_fast.images import to_uint8

N, LABELS = 13, [0, 2, 1]
REFERENCE = Gaussian(torch.full((6,), 0.4).double(), 0.1 * torch.eye(6).double())


def small(images: Tensor) -> Tensor:
    x = images.float() / 255
    return torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)


def sampler(**how: Any) -> tff.Sampler:
    model = random_model(in_channels=3, num_classes=3)
    model.metadata = {"noise_type": "gaussian", "noise_std": 0.3}
    return tff.Sampler(model, solver="sequential", **how)


def swept(who: tff.Sampler, n: int = N, **how: Any) -> list[TuningPoint]:
    return tune(who, small, REFERENCE, n, LABELS, batch_size=4, **how)


@pytest.mark.parametrize("details", [{}, {"annealed_guidance": True, "attn_temp": 0.5, "guide_what": "a"}])
def test_points_are_the_fids_of_what_is_sampled(details: dict[str, Any]) -> None:
    who, drawn = sampler(), list[int]()
    weights, rates = [0.0, 2.0], [1.3, 0.0, 1.0]
    points = swept(who, guidance=weights, denoise_scale=rates, seed=5, progress=drawn.append, **details)
    assert [(point.guidance, point.denoise_scale) for point in points] == [(w, r) for w in weights for r in rates]
    assert drawn == [4, 4, 4, 1] * 2
    for point in points:
        how = {"denoise": True, "denoise_scale": point.denoise_scale} if point.denoise_scale else {}
        how |= {"guidance": point.guidance, **details} if point.guidance else {}
        images = to_uint8(who.sample(N, LABELS, seed=5, batch_size=4, **how).images)
        wanted = frechet_distance(feature_sums([images], small).gaussian(), REFERENCE)
        assert point.fid == pytest.approx(wanted, rel=1e-3)  # a pixel may be another by a level, as rounding goes
    assert len({round(point.fid, 6) for point in points}) == 6


def test_images_are_drawn_once_for_all_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    who = sampler()
    calls = []
    plain = who.flow.denoise
    assert plain is not None

    def counted(*args: Any, **how: Any) -> Tensor:
        calls.append(how["scale"])
        return plain(*args, **how)

    who.flow = dataclasses.replace(who.flow, denoise=counted)
    swept(who, guidance=[1.0], denoise_scale=[0.5, 1.0, 1.5])
    assert calls == [1.0] * 4
    calls.clear()
    swept(who, guidance=[1.0])
    assert calls == []


def test_without_denoising_no_noise_has_to_be_known() -> None:
    who = tff.Sampler(random_model(in_channels=3, num_classes=3), solver="sequential")
    (point,) = swept(who, guidance=[0.0])
    assert (point.guidance, point.denoise_scale) == (0, 0)
    with pytest.raises(ArgumentError, match="noise_std"):
        swept(who, guidance=[0.0], denoise_scale=[1.0])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"guidance": []}, "guidance: expected at least one number"),
        ({"guidance": [1.0, 1.0]}, "none of them twice"),
        ({"guidance": [1.0], "denoise_scale": ()}, "denoise_scale: expected at least one number"),
        ({"guidance": [1.0, -1.0]}, "guidance: expected a finite number >= 0"),
        ({"guidance": [1.0], "n": 1}, "n: expected an integer >= 2"),
        ({"guidance": [1.0], "trajectory": True}, "details: expected guide_what, attn_temp, annealed_guidance"),
        ({"guidance": [0.0], "attn_temp": 0.5}, "attn_temp: expected the default"),
        ({"guidance": [1.0], "noise_std": 0.5}, "noise_std: expected the default"),
    ],
)
def test_wrong_arguments_are_refused(how: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    who = sampler()
    monkeypatch.setattr(who, "_draw", None)
    with pytest.raises(ArgumentError, match=message):
        swept(who, **how)


POINTS = [TuningPoint(w, r, 10 + (w - 1) ** 2 + r) for w in (2.0, 0.0, 1.0) for r in (0.0, 1.0)]


def test_the_curve_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    save_curve(POINTS, tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.format == "PNG"
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]
    with pytest.raises(ArgumentError, match=r"path: expected a file name ending in \.png"):
        save_curve(POINTS, tmp_path / "curve.txt")


def test_without_matplotlib_one_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"pip install 'tarflow_fast\[fid\]' brings it"):
        save_curve(POINTS, tmp_path / "curve.png")
