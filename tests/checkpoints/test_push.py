"""Models are pushed to a hub and its refusals told, by a stand-in for huggingface_hub's functions."""

from __future__ import annotations

import builtins
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import same
from hubs import COMMIT, model

import tarflow_fast as tff
from tarflow_fast.checkpoints.card import model_card
from tarflow_fast.errors import ArgumentError, BackendError, CheckpointError


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
