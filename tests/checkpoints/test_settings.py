"""What a file records of a model is checked when it is read, and when it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import random_model
from safetensors.torch import save_file

import tarflow_fast as tff
from tarflow_fast.errors import ArgumentError, CheckpointError

BAD: list[tuple[dict[str, Any], str]] = [
    ({"class_names": "ab"}, "class_names: expected a list of names, got 'ab'"),
    ({"class_names": ["a"]}, "class_names: expected 2, one for each class, got 1"),
    ({"class_names": ["a", "b", "c"]}, "class_names: expected 2, one for each class, got 3"),
    ({"class_names": ["a", 3]}, "class_names: expected a list of names"),
    ({"class_names": ["a", ""]}, "class_names: expected a list of names"),
    ({"class_names": {"a": 0, "b": 1}}, "class_names: expected a list of names"),
    ({"sampling": 3}, "sampling: expected values of guidance, guide_what, "),
    ({"sampling": {"steps": 3}}, "sampling: expected values of guidance, guide_what, "),
    ({"sampling": {"guidance": -1}}, "sampling: guidance: expected a finite number >= 0 and <= 1000, got -1"),
    ({"sampling": {"guidance": "2"}}, "sampling: guidance: expected a finite number"),
    ({"sampling": {"guide_what": "c"}}, "sampling: guide_what: expected one of 'a', 'b', 'ab', got 'c'"),
    ({"sampling": {"attn_temp": 0}}, "sampling: attn_temp: expected a finite number > 0"),
    ({"sampling": {"annealed_guidance": "yes"}}, "sampling: annealed_guidance: expected a bool"),
    ({"sampling": {"denoise": None}}, "sampling: denoise: expected a bool, got None"),
    ({"sampling": {"denoise_scale": 1e9}}, "sampling: denoise_scale: expected a finite number"),
    ({"sampling": {"denoise": True}}, "sampling: denoise: expected False, as no noise_std > 0 is recorded"),
    ({"noise_std": -0.1}, "noise_std: expected a finite number >= 0, got -0.1"),
    ({"noise_std": float("nan")}, "noise_std: expected a finite number >= 0, got nan"),
    ({"noise_std": float("inf")}, "noise_std: expected a finite number >= 0, got inf"),
    ({"noise_std": 10**400}, "noise_std: expected a finite number >= 0, got 1000.*…"),
    ({"noise_std": "0.1"}, "noise_std: expected a finite number >= 0, got '0.1'"),
    ({"noise_std": True}, "noise_std: expected a finite number >= 0, got True"),
    ({"noise_type": "Gauss\x1b"}, r"noise_type: expected 'gaussian' or 'uniform', got 'Gauss\\x1b'"),
    ({"noise_type": ["gaussian"]}, "noise_type: expected"),
]


@pytest.mark.parametrize(("metadata", "says"), BAD, ids=lambda value: str(value)[:60])
def test_metadata_that_no_model_has_is_refused(tmp_path: Path, metadata: dict[str, Any], says: str) -> None:
    import json

    model = random_model(num_classes=2)
    header = json.dumps({"config": model.config.to_dict(), "metadata": metadata})
    save_file(dict(model.state_dict()), tmp_path / "m.safetensors", {"tarflow_fast": header})
    with pytest.raises(CheckpointError, match=says) as caught:
        tff.load(tmp_path / "m.safetensors")
    assert str(caught.value).isprintable()
    model.metadata = metadata
    for name in ("n.safetensors", "n.pth"):
        with pytest.raises(ArgumentError, match=f"model: expected metadata that a file can hold, got {says}"):
            tff.save(model, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_metadata_that_json_cannot_hold_is_refused_before_writing(tmp_path: Path) -> None:
    model = random_model()
    for value in (torch.ones(1), {1, 2}, object()):
        model.metadata = {"x": value}
        with pytest.raises(ArgumentError, match="metadata that a file can hold"):
            tff.save(model, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_missing_noise_is_said_where_it_is_wanted(tmp_path: Path) -> None:
    tff.save(random_model(in_channels=3), tmp_path / "m.pth")
    model = tff.load(tmp_path / "m.pth")  # in silence
    with pytest.raises(ArgumentError, match=r"noise_std: expected .* which this checkpoint does not record"):
        tff.Sampler(model).sample(1, denoise=True)


@pytest.mark.parametrize(("channels", "patch", "said"), [(1, 2, True), (1, 4, True), (1, 3, False), (3, 2, False)])
def test_channels_that_weights_leave_open_are_said(tmp_path: Path, channels: int, patch: int, said: bool) -> None:
    import warnings

    torch.save(random_model(in_channels=channels, img_size=12, patch_size=patch).state_dict(), tmp_path / "m.pth")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert tff.load(tmp_path / "m.pth").config.in_channels == channels
    assert [f"taken as 1, patches of {patch}×{patch}" in str(each.message) for each in caught] == [True] * said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tff.load(tmp_path / "m.pth", patch_size=patch)
        tff.load(tmp_path / "m.pth", in_channels=channels)


def test_heads_that_weights_leave_open_have_to_be_given(tmp_path: Path) -> None:
    model = random_model(in_channels=3, channels=96, head_dim=32)
    with pytest.warns(tff.TarFlowWarning, match="load it with patch_size=2, head_dim=32"):
        tff.save(model, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=r"its width 96 is no multiple of 64; give head_dim$"):
        tff.load(tmp_path / "m.pth")
    assert tff.load(tmp_path / "m.pth", head_dim=32).config == model.config
    tff.save(model, tmp_path / "m.safetensors")
    assert tff.load(tmp_path / "m.safetensors").config == model.config
