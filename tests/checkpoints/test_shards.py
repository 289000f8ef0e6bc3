"""Models in several files: by their table, by their folder, and tables that lie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import refused, same, shard, small

import tarflow_fast as tff


def test_shards_load_by_table_or_folder(tmp_path: Path) -> None:
    index = shard(tmp_path, small())
    assert same(tff.load(index), small())
    assert same(tff.load(tmp_path), small())
    assert same(tff.load(str(tmp_path)), small())
    (tmp_path / "config.json").write_text('{"in_channels": 12, "patch_size": 1}')
    assert tff.load(tmp_path).config.in_channels == 12


def test_a_folder_of_one_file_loads(tmp_path: Path) -> None:
    tff.save(small(), tmp_path / "model.safetensors")
    assert same(tff.load(tmp_path), small())


def shards_of(name: Any) -> Callable[[dict[str, Any]], None]:
    return lambda table: table["weight_map"].__setitem__("var", name)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (shards_of("gone.safetensors"), "its shard 'gone.safetensors' is missing"),
        (shards_of("../model-00001-of-00003.safetensors"), "a shard must be a file beside its table"),
        (shards_of("/etc/passwd"), "a shard must be a file beside its table"),
        (shards_of("model.safetensors.index.json"), "is missing"),
        (shards_of("a\x1b\0"), "a shard must be"),
        (shards_of(3), "a shard must be"),
        (lambda table: table["weight_map"].update(nothing="model-00001-of-00003.safetensors"), "has no 'nothing'"),
        (lambda table: table.clear(), "no 'weight_map'"),
        (lambda table: table.update(weight_map=[1]), "no 'weight_map'"),
    ],
)
def test_tables_of_shards_that_lie(tmp_path: Path, change: Callable[[dict[str, Any]], None], says: str) -> None:
    refused(shard(tmp_path, small(), change=change), says)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    index = shard(tmp_path, small())
    path = tmp_path / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    refused(index, "its shard 'model-00002-of-00003.safetensors': not a readable safetensors file")
    index.write_text("{" * 100_000)
    refused(index, "is not JSON")
