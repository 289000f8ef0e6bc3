"""Models on a hub and behind URLs: against a server on this machine that answers as the Hugging Face Hub does, and,
where huggingface_hub is not installed, a stand-in of its functions."""

from __future__ import annotations

import builtins
import hashlib
import json
import re
import sys
import threading
import types
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import random_model

import tarflow_fast as tff
from tarflow_fast.checkpoints.card import CARD, model_card
from tarflow_fast.checkpoints.hub import HubFile, Url, library, reference
from tarflow_fast.errors import ArgumentError, BackendError, CheckpointError
from tarflow_fast.models.tarflow import TarFlow

COMMIT, OLD = "c" * 40, "0" * 40


def model(seed: int = 0) -> TarFlow:
    made = random_model(seed, in_channels=3, img_size=4, num_classes=2)
    made.metadata = {"noise_type": "gaussian", "noise_std": 0.1, "class_names": ["a", "b"]}
    return made


def same(a: TarFlow, b: TarFlow) -> bool:
    return all(torch.equal(value, b.state_dict()[key]) for key, value in a.state_dict().items())


# What names mean


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


# Files behind URLs


class Server(ThreadingHTTPServer):
    """A repository, "owner/name" at COMMIT, and plain files under /files/. requests: what was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.short = 0
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def answer(self, body: bool) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        headers: dict[str, str] = {}
        status, data = 404, b""
        found = re.fullmatch(r"/owner/name/resolve/([^/]+)/(.+)", self.path)
        if self.path.startswith("/files/"):
            data = self.server.files.get(self.path[7:].partition("?")[0], b"")
            status = 200 if data else 404
        elif re.fullmatch(rf"/api/models/owner/name(/revision/(main|{COMMIT}))?(\?.*)?", self.path):
            siblings = [{"rfilename": name} for name in self.server.files]
            status, data = 200, json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": siblings}).encode()
        elif re.match(rf"/api/models/owner/name/tree/(main|{COMMIT})", self.path):
            tree = [{"type": "file", "path": n, "size": len(d), "oid": "1"} for n, d in self.server.files.items()]
            status, data = 200, json.dumps(tree).encode()
        elif found and found[1] not in ("main", COMMIT):
            headers["X-Error-Code"] = "RevisionNotFound"
        elif found and found[2] not in self.server.files:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
        elif found:
            status, data = 200, self.server.files[found[2]]
            headers |= {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        else:
            headers["X-Error-Code"] = "RepoNotFound"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data[: len(data) - self.server.short])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def saved(tmp_path: Path, name: str, seed: int = 0) -> bytes:
    tff.save(model(seed), tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    return data


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


# The hub, by the library itself


@pytest.fixture
def hub(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Server:
    pytest.importorskip("huggingface_hub")
    the_hub = library()
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    for name, value in {
        "ENDPOINT": server.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_TOKEN_PATH": str(tmp_path / "token"),
    }.items():
        monkeypatch.setattr(the_hub.constants, name, value)
    return server


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
    from test_stored import shard

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


# The hub, by a stand-in


class Fake(types.ModuleType):
    """What is used of huggingface_hub, on a folder."""

    def __init__(self, root: Path) -> None:
        super().__init__("huggingface_hub")
        self.root, self.made, self.message = root, [], None
        self.errors = types.ModuleType("huggingface_hub.errors")
        for name, base in {
            "EntryNotFoundError": Exception,
            "HfHubHTTPError": OSError,
            "OfflineModeIsEnabled": ConnectionError,
            "HFValidationError": ValueError,
        }.items():
            setattr(self.errors, name, type(name, (base,), {}))
        for name, base in {
            "LocalEntryNotFoundError": "EntryNotFoundError",
            "RepositoryNotFoundError": "HfHubHTTPError",
            "RevisionNotFoundError": "HfHubHTTPError",
        }.items():
            setattr(self.errors, name, type(name, (getattr(self.errors, base),), {}))
        self.errors.GatedRepoError = type("GatedRepoError", (self.errors.RepositoryNotFoundError,), {})  # type: ignore[attr-defined]
        self.constants = types.ModuleType("huggingface_hub.constants")
        self.constants.HF_HUB_OFFLINE = False  # type: ignore[attr-defined]
        self.raises: Exception | None = None

    def hf_hub_download(self, repo: str, file: str, *, revision: str | None, local_files_only: bool = False) -> str:
        if self.raises is not None:
            raise self.raises
        path = self.root / "snapshots" / COMMIT / file
        if not path.is_file():
            raise self.errors.EntryNotFoundError(file)
        return str(path)

    def HfApi(self, token: str | None = None) -> Fake:
        return self

    def list_repo_files(self, repo: str, revision: str | None = None) -> list[str]:
        return [path.name for path in (self.root / "snapshots" / COMMIT).iterdir()]

    def create_repo(self, repo: str, **options: Any) -> None:
        if self.raises is not None:
            raise self.raises
        self.made.append((repo, options))

    def file_exists(self, repo: str, file: str, revision: str | None = None) -> bool:
        return (self.root / "snapshots" / COMMIT / file).is_file()

    def upload_folder(self, *, repo_id: str, folder_path: str, revision: str | None, commit_message: str) -> Any:
        self.message = commit_message
        for path in Path(folder_path).iterdir():
            (self.root / "snapshots" / COMMIT / path.name).write_bytes(path.read_bytes())
        return types.SimpleNamespace(oid=COMMIT)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake(tmp_path / "hub")
    (tmp_path / "hub" / "snapshots" / COMMIT).mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "huggingface_hub", made)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", made.errors)
    monkeypatch.setitem(sys.modules, "huggingface_hub.constants", made.constants)
    return made


def test_what_is_pushed_is_loaded_again(fake: Fake, tmp_path: Path) -> None:
    name = tff.push_to_hub(model(), "owner/name", private=True)
    assert name == f"hf://owner/name@{COMMIT}/model.safetensors"
    assert fake.made == [("owner/name", {"private": True, "exist_ok": True})]
    loaded = tff.load(name)
    assert same(loaded, model())
    assert loaded.metadata == model().metadata
    assert same(tff.load("hf://owner/name"), model())
    readme = tmp_path / "hub" / "snapshots" / COMMIT / "README.md"
    assert readme.read_text(encoding="utf-8") == model_card(model())
    readme.write_text("mine")
    tff.push_to_hub(model(1), "owner/name")
    assert readme.read_text() == "mine"
    tff.push_to_hub(model(1), "owner/name", card="other")
    assert readme.read_text() == "other"
    for repo in ("name", "owner/name/file", "owner/name@main", "", 3):
        with pytest.raises(ArgumentError, match=r"^(repo_id|path): expected"):
            tff.push_to_hub(model(), repo)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("LocalEntryNotFoundError", "not in the cache, and the hub cannot be reached"),
        ("GatedRepoError", "gated; ask for access"),
        ("RepositoryNotFoundError", "no such repository"),
        ("RevisionNotFoundError", "no such revision"),
        ("OfflineModeIsEnabled", "HF_HUB_OFFLINE is set"),
        ("HfHubHTTPError", "the hub cannot be reached or refuses"),
    ],
)
def test_refusals_of_the_hub_are_one_line(fake: Fake, error: str, says: str) -> None:
    fake.raises = getattr(fake.errors, error)("\x1b[31mmany\nlines")
    for ask in (lambda: tff.load("hf://owner/name"), lambda: tff.push_to_hub(model(), "owner/name")):
        with pytest.raises(CheckpointError, match=says) as caught:
            ask()
        assert str(caught.value).isprintable()


def test_without_the_library_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Any] = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BackendError, match=r"pip install 'tarflow_fast\[hub\]'"):
        tff.load("hf://owner/name")


# Cards


def test_a_card_tells_what_the_model_records(tmp_path: Path) -> None:
    text = tff.model_card(model())
    assert text.startswith("---\n" + CARD)
    for part in ("class-conditional", "3 × 4 × 4", "σ = 0.1", '"a", "b"', "labels=[0, 1], denoise=True"):
        assert part in text
    plain = model_card(random_model())
    assert "unconditional" in plain
    assert "not recorded" in plain
    assert "denoise=True" not in plain


def test_a_card_of_ones_own_is_written_again_and_a_readme_is_kept(tmp_path: Path) -> None:
    readme, path = tmp_path / "README.md", tmp_path / "m.safetensors"
    for text in ("one\n", "one\n", "two", model_card(model()), "three"):
        tff.save(model(), path, card=text)
        assert readme.read_bytes() == text.encode()
    tff.save(model(), tmp_path / "m.pth", card="three")  # the same text loses nothing
    readme.write_text("three, and notes")
    for card in (True, "four"):
        with pytest.raises(ArgumentError, match=r"^card: expected no README.md of another kind"):
            tff.save(model(), path, card=card)
    path.write_bytes(b"no model")
    with pytest.raises(ArgumentError, match=r"^card: expected no README.md of another kind"):
        tff.save(model(), path, card="four")
    assert readme.read_text() == "three, and notes"
    assert path.read_bytes() == b"no model"


def test_a_card_that_cannot_be_written_is_said_before_the_weights_are(tmp_path: Path) -> None:
    named = model()
    named.metadata["class_names"] = ["a", "\ud800"]
    for given, card in ((model(), "a\udc80b"), (named, True)):
        with pytest.raises(ArgumentError, match=r"^card: expected text that UTF-8 can hold, got '\\ud[c8][08]0'$"):
            tff.save(given, tmp_path / "m.safetensors", card=card)
        assert not list(tmp_path.glob("m.*"))


def test_save_writes_a_card_beside_and_keeps_another(tmp_path: Path) -> None:
    tff.save(model(), tmp_path / "m.safetensors", card=True)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == model_card(model())
    tff.save(model(), tmp_path / "m.safetensors", card=CARD + " mine")
    tff.save(model(), tmp_path / "m.safetensors", card=True)
    (tmp_path / "README.md").write_text("a project's")
    (tmp_path / "m.safetensors").unlink()
    with pytest.raises(ArgumentError, match=r"^card: expected no README.md of another kind"):
        tff.save(model(), tmp_path / "m.safetensors", card=True)
    with pytest.raises(ArgumentError, match=r"^card: expected a bool"):
        tff.save(model(), tmp_path / "m.safetensors", card=3)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "a project's"
