"""Models behind URLs, from a server on this machine."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from checkpoint_files import same
from hubs import Server, model, saved

import tarflow_fast as tff
from tarflow_fast.errors import CheckpointError


def test_a_file_behind_a_url_is_loaded_once_and_named_by_its_digest(server: Server, tmp_path: Path) -> None:
    name = "x_model_2_64_2_1_0.07.pth"  # a name that tells of the model, as ml-tarflow's
    server.files[name] = data = saved(tmp_path, name)
    url = f"{server.address}/files/{name}"
    loaded = tff.load(url)
    assert same(loaded, model())
    assert loaded.metadata["noise_std"] == 0.07
    assert loaded.origin is not None
    assert loaded.origin.path == f"{url} (sha256 {hashlib.sha256(data).hexdigest()})"
    server.files.clear()
    assert same(tff.load(url), model())
    assert len(server.requests) == 1
    server.files[name] = saved(tmp_path, name, 1)
    assert same(tff.load(url + "?v=2"), model(1))  # another URL, another file


def test_urls_that_fail_leave_nothing(server: Server, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"/files/none\.pth: HTTP status 404$"):
        tff.load(f"{server.address}/files/none.pth")
    server.files["m.pth"] = saved(tmp_path, "m.pth")
    server.short = 100
    with pytest.raises(CheckpointError, match="ended early"):
        tff.load(f"{server.address}/files/m.pth")
    server.short = 0
    server.files["page.pth"] = b"<html>"
    with pytest.raises(CheckpointError, match="web page"):
        tff.load(f"{server.address}/files/page.pth")
    assert same(tff.load(f"{server.address}/files/m.pth"), model())
    assert sorted(p.name for p in (tmp_path / "cache").rglob("*") if p.is_file()) == ["m.pth", "page.pth"]


def test_a_machine_that_cannot_be_reached_is_said(server: Server) -> None:
    address = server.address
    server.socket.close()
    with pytest.raises(CheckpointError, match=r"cannot be reached \(.+\), and is not in the cache$"):
        tff.load(f"{address}/files/m.pth")
