"""Damaged files and wrong types of what is in them: whatever a file holds, it is a whole model or one error."""

from __future__ import annotations

import random
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import SECONDS, shard, small
from torch import Tensor

import tarflow_fast as tff
from tarflow_fast.errors import CheckpointError


def damaged(content: bytes, chance: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 8))):
        at = chance.randrange(len(data)) if chance.random() < 0.5 else chance.randrange(min(len(data), 2000))
        kind = chance.randrange(6)
        if kind == 0:
            del data[at:]
        elif kind == 1:
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 2:
            data[at : at + 8] = chance.choice((2**63 - 1, 2**32, 2**31 - 1, 0)).to_bytes(8, "little")
        elif kind == 3:
            del data[at : at + chance.randrange(1, 40)]
        elif kind == 4:
            data[at:at] = data[at // 2 : at // 2 + chance.randrange(1, 200)]
        else:
            data[at : at + 4] = chance.randbytes(4)
        if len(data) < 2:
            break
    return bytes(data)


@pytest.mark.filterwarnings("ignore::tarflow_fast.errors.TarFlowWarning")
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "safetensors", "index"])
def test_damaged_files_are_one_error_or_a_whole_model(tmp_path: Path, kind: str) -> None:
    chance, path = random.Random(kind), tmp_path / "m"
    model = small()
    model.metadata = {"noise_type": "gaussian", "noise_std": 0.1, "class_names": ["a", "b"]}
    content = {"model": model.state_dict(), "ema": model.state_dict(), "config": {"noise_std": 0.1}, "n": [1, (2, 3)]}
    if kind == "safetensors":
        tff.save(model, tmp_path / "m.safetensors")
        whole = (tmp_path / "m.safetensors").read_bytes()
    elif kind == "index":
        path = shard(tmp_path, model)
        whole = path.read_bytes()
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")
        whole = path.read_bytes()
        if kind == "pickle":  # alone, as a zip's checksum is not looked at there
            with zipfile.ZipFile(path) as archive:
                entries = {info.filename: archive.read(info) for info in archive.infolist()}
    loaded, said = 0, []
    for _ in range(120):
        if kind == "pickle":
            with zipfile.ZipFile(path, "w") as archive:
                for name, data in entries.items():
                    archive.writestr(name, damaged(data, chance) if name.endswith("data.pkl") else data)
        else:
            path.write_bytes(damaged(whole, chance))
        start = time.perf_counter()
        try:
            back = tff.load(path)
        except CheckpointError as error:
            said.append(str(error))
        else:
            loaded += 1
            assert all(torch.isfinite(value).all() for value in back.state_dict().values())
        assert time.perf_counter() - start < SECONDS
    assert loaded < 100
    assert all(text.isprintable() and text.startswith(str(path)) for text in said)


ODD: list[Any] = [
    None,
    3,
    -1.5,
    True,
    "text",
    b"bytes",
    [],
    [1],
    (),
    {},
    {"a": 1},
    {1: 2},
    Path("x"),
    2**70,
    float("nan"),
]

TENSORS: list[Tensor] = [
    *(torch.tensor(1.0), torch.ones(0), torch.ones(3), torch.ones(2, 2, dtype=torch.int64), torch.ones(1, 1, 1, 1, 1)),
    *(torch.ones(2, 64, dtype=torch.bool), torch.full((64, 12), torch.nan), torch.ones(10, 64)[::2]),
]


@pytest.mark.filterwarnings("ignore::tarflow_fast.errors.TarFlowWarning")
@pytest.mark.parametrize("legacy", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_wrong_types_are_one_error_or_a_whole_model(tmp_path: Path, legacy: bool) -> None:
    chance, path = random.Random(int(legacy)), tmp_path / "m.pth"
    for _ in range(150):
        state: dict[Any, Any] = dict(small().state_dict())
        for _ in range(chance.choice((1, 1, 3))):
            key = chance.choice([*state, "blocks.0", "", "a", 3, "ema", "module.var", "model", "config"])
            odd = chance.choice([*ODD, *TENSORS])
            if chance.random() < 0.2:
                state.pop(key, None)
            else:
                state[key] = odd
        content: Any = chance.choice((state, {"model": state}, {"ema": state, "model": chance.choice(ODD)}, [state]))
        if chance.random() < 0.2:
            content = {"sizes": chance.choice(ODD), "fingerprint": 1, "metadata": chance.choice(ODD), "model": state}
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        start, said = time.perf_counter(), str(path)
        try:
            back = tff.load(path)
        except CheckpointError as error:
            said = str(error)
        else:
            assert all(torch.isfinite(value).all() for value in back.state_dict().values())
        assert said.isprintable()
        assert said.startswith(str(path))
        assert time.perf_counter() - start < SECONDS
