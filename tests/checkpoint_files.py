"""This module makes checkpoint files for tests: a small model and its shards; and it loads what must be one error."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import random_model
from safetensors.torch import save_file

import tarflow_fast as tff
from tarflow_fast.errors import CheckpointError
from tarflow_fast.models.tarflow import TarFlow

SECONDS = 5.0  # for any of these files, on a machine that does other things as well


def small() -> TarFlow:
    return random_model(in_channels=3, img_size=4, num_classes=2)


def refused(path: Path, says: str | None = None) -> None:
    """Loads a file that must be one error, at once and without memory of the size that it claims."""
    import resource

    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(CheckpointError, match=says) as caught:
        tff.load(path)
    assert time.perf_counter() - start < SECONDS
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    assert grown < 200e6
    text = str(caught.value)
    assert text.isprintable()
    assert text.startswith(f"{path}: ")
    assert len(text) < 700


def same(a: TarFlow, b: TarFlow) -> bool:
    return all(torch.equal(value, b.state_dict()[key]) for key, value in a.state_dict().items())


def shard(folder: Path, model: TarFlow, parts: int = 3, change: Callable[[dict[str, Any]], None] | None = None) -> Path:
    keys = list(model.state_dict())
    names = {key: f"model-{i % parts + 1:05d}-of-{parts:05d}.safetensors" for i, key in enumerate(keys)}
    for name in set(names.values()):
        save_file({key: model.state_dict()[key].clone() for key in keys if names[key] == name}, folder / name)
    table = {"metadata": {"total_size": 1}, "weight_map": names}
    if change is not None:
        change(table)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps(table))
    return index
