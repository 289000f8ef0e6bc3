"""Models on a hub: against a server on this machine that answers as the Hugging Face Hub does."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoint_files import same, shard
from hubs import COMMIT, Server, model, saved

import tarflow_fast as tff
from tarflow_fast.checkpoints.hub import HubFile, Url, reference
from tarflow_fast.errors import ArgumentError, CheckpointError


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("hf://a/b", HubFile("a/b", None, None)),
        ("hf://a/b/", HubFile("a/b", None, None)),
        ("hf:/a/b", HubFile("a/b", None, None)),  # what pathlib makes of it
        ("hf://a/b@v1", HubFile("a/b", "v1", None)),
        ("hf://a/b@refs/pr/3/c/d.pth", HubFile("a/b", "refs/pr/3", "c/d.pth")),
        ("hf://a/b/c/d.pth", HubFile("a/b", None, "c/d.pth")),
        ("https://huggingface.co/a/b", HubFile("a/b", None, None)),
        ("https://huggingface.co/a/b/tree/v1", HubFile("a/b", "v1", None)),
        ("https://huggingface.co/a/b/blob/main/x/m.pth", HubFile("a/b", "main", "x/m.pth")),
        ("https://huggingface.co/a/b/resolve/main/m%20n.pth?download=true", HubFile("a/b", "main", "m n.pth")),
        ("https://elsewhere.org/m.pth", Url("https://elsewhere.org/m.pth")),
        ("m.pth", None),
        ("hf", None),
        ("https", None),
        ("C:\\m.pth", None),
    ],
)
def test_what_a_name_means(path: str, meant: object) -> None:
    assert reference(path) == meant


@pytest.mark.parametrize(
    "path",
    [
        *("hf://", "hf://a", "hf://a/b@", "hf://a/b/../../c", "https://", "https:///x", "http:/a", "https://[/m.pth"),
        *(
            "https://huggingface.co/a",
            "https://huggingface.co/a/b/resolve/main/../x",
            "https://a/\x1b[31m",
            "hf://a b/c",
        ),
    ],
)
def test_wrong_names(path: str) -> None:
    with pytest.raises(ArgumentError, match=r"^path: expected "):
        tff.load(path)


def test_a_repository_loads_pinned_and_cached(hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files["model.safetensors"] = saved(tmp_path, "model.safetensors")
    for name in ("hf://owner/name", "hf://owner/name@main", f"hf://owner/name@{COMMIT}/model.safetensors"):
        loaded = tff.load(name)
        assert same(loaded, model())
        assert loaded.metadata == model().metadata
        assert loaded.origin is not None
        assert loaded.origin.path == f"hf://owner/name@{COMMIT}/model.safetensors"
    assert same(tff.load(f"{hub.address}/owner/name"), model())
    assert sum(request.startswith("GET /owner") for request in hub.requests) == 1  # the file itself
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert same(tff.load("hf://owner/name"), model())
    with pytest.raises(CheckpointError, match="hf://owner/other: not in the cache, and HF_HUB_OFFLINE is set"):
        tff.load("hf://owner/other")
    assert len(hub.requests) == asked


def test_what_a_repository_has_not_is_said(hub: Server, tmp_path: Path) -> None:
    hub.files |= {"a.pth": saved(tmp_path, "a.pth"), "b.ckpt": b"x", "README.md": b"x"}
    with pytest.raises(CheckpointError, match=r"hf://owner/name: no model\.safetensors; .*'a\.pth', 'b\.ckpt'"):
        tff.load("hf://owner/name")
    assert same(tff.load("hf://owner/name/a.pth"), model())
    del hub.files["b.ckpt"]
    assert same(tff.load("hf://owner/name"), model())  # the only one there is
    with pytest.raises(CheckpointError, match=r"c\.pth: no such file$"):
        tff.load("hf://owner/name/c.pth")
    with pytest.raises(CheckpointError, match="no such revision"):
        tff.load("hf://owner/name@v9/a.pth")
    with pytest.raises(CheckpointError, match="no such repository, or a private one"):
        tff.load("hf://owner/none/a.pth")


def test_shards_of_a_repository(hub: Server, tmp_path: Path) -> None:
    shard(tmp_path, model())
    hub.files |= {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    loaded = tff.load("hf://owner/name")
    assert same(loaded, model())
    assert loaded.origin is not None
    assert loaded.origin.path == f"hf://owner/name@{COMMIT}/model.safetensors.index.json"


@pytest.mark.slow  # the library tries again and again for half a minute
def test_a_hub_that_cannot_be_reached(hub: Server) -> None:
    hub.shutdown()
    hub.socket.close()
    with pytest.raises(
        CheckpointError, match=r"hf://owner/name/a\.pth: not in the cache, and the hub cannot be reached"
    ):
        tff.load("hf://owner/name/a.pth")
