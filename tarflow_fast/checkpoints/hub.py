"""Models on the Hugging Face Hub, by `huggingface_hub` (extra [hub]), and behind other URLs; both kept in a cache."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch

from ..errors import ArgumentError, BackendError, CheckpointError
from ..files import replacing
from .stored import INDEX, shard_names

T = TypeVar("T")

# What a folder or a repository of a model holds, the first that is there.
NAMES = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "checkpoint.pt"),
)
CONFIG = "config.json"
SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
TIMEOUT = 30.0  # seconds without an answer
_REPOSITORY = r"(?P<repo>[\w.-]+/[\w.-]+)"
_REVISION = r"(?P<revision>refs/[\w.-]+/[\w.-]+|[^/@]+)"
_HF = re.compile(rf"hf:/{{1,2}}{_REPOSITORY}(@{_REVISION})?(/(?P<file>.+?))?/?", re.ASCII)
_WEB = re.compile(rf"/{_REPOSITORY}(/(resolve|blob|raw|tree)/{_REVISION}(/(?P<file>.+?))?)?/?", re.ASCII)


def reference(path: str) -> HubFile | Url | None:
    """What a path that is none refers to, or None for a path of this machine. Raises ArgumentError for a wrong one."""
    if re.match(r"hf:/", path):
        match = _HF.fullmatch(path)
        if match is None or ".." in path.split("/"):
            raise ArgumentError("path", "hf://owner/name[@revision][/file]", repr(path))
        return HubFile(match["repo"], match["revision"], match["file"])
    if not re.match(r"https?:/", path, re.IGNORECASE):
        return None
    try:
        parts = urllib.parse.urlsplit(path)
        host = parts.hostname
    except ValueError:
        host = None
    if not host or "//" not in path or not path.isprintable() or " " in path:
        raise ArgumentError("path", "a whole URL, https://host/file", repr(path))
    endpoint = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", ""))
    if host in ("huggingface.co", "hf.co") or (parts.netloc and parts.netloc == endpoint.netloc):
        match = _WEB.fullmatch(urllib.parse.unquote(parts.path))
        if match is None or ".." in parts.path.split("/"):
            raise ArgumentError("path", "the URL of a model's repository, or of a file in one", repr(path))
        return HubFile(match["repo"], match["revision"], match["file"])
    return Url(path)


@dataclass(frozen=True)
class HubFile:
    """A file of a repository; file None: the model of that repository; revision None: its main branch."""

    repo: str
    revision: str | None
    file: str | None

    def __str__(self) -> str:
        at = "" if self.revision is None else f"@{self.revision}"
        return f"hf://{self.repo}{at}" + ("" if self.file is None else f"/{self.file}")

    def fetch(self) -> tuple[Path, str]:
        """(the file in the cache, its name with the commit), with shards and settings beside it."""
        path = self._download(self.file, self.revision) if self.file is not None else self._model()
        snapshot = next(folder for folder in path.parents if folder.parent.name == "snapshots")
        commit, name = snapshot.name, PurePosixPath(path.relative_to(snapshot).as_posix())
        if name.name.endswith(INDEX):
            try:
                shards = sorted(set(shard_names(path).values()))
            except CheckpointError as error:
                raise CheckpointError(f"{self}: {error}") from error
            for shard in shards:
                self._download(str(name.with_name(shard)), commit)
        if name.name in NAMES:
            self._find((str(name.with_name(CONFIG)),), commit)
        return path, f"hf://{self.repo}@{commit}/{name}"

    def _model(self) -> Path:
        found = self._find(NAMES, self.revision)
        if found is not None:
            return found
        hub = library()
        files = self.ask(lambda: hub.HfApi().list_repo_files(self.repo, revision=self.revision))
        fits = [name for name in files if name.endswith(SUFFIXES)]
        if len(fits) != 1:
            listed = ", ".join(map(repr, fits[:5])) or "none"
            raise CheckpointError(f"{self}: no {NAMES[0]}; add one of its files to the name (checkpoints: {listed})")
        return self._download(fits[0], self.revision)

    def _find(self, names: tuple[str, ...], revision: str | None) -> Path | None:
        """The first of these that the repository has. Where it cannot be reached, the first in the cache."""
        hub, local, unreached = library(), False, None
        for name in names:
            try:
                return Path(
                    self.ask(
                        lambda name=name, local=local: hub.hf_hub_download(  # type: ignore[misc]
                            self.repo, name, revision=revision, local_files_only=local
                        )
                    )
                )
            except _NotCached as error:
                local, unreached = True, error
            except _NoSuchFile:
                continue
        if unreached is not None and len(names) > 1:
            raise unreached
        return None

    def _download(self, file: str, revision: str | None) -> Path:
        hub = library()
        return Path(self.ask(lambda: hub.hf_hub_download(self.repo, file, revision=revision)))

    def ask(self, question: Callable[[], T]) -> T:
        """The hub's answer, or its refusal in one line."""
        errors = library().errors
        try:
            return question()
        except errors.LocalEntryNotFoundError as error:
            offline = library().constants.HF_HUB_OFFLINE
            why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
            raise _NotCached(f"{self}: not in the cache, and {why}") from error
        except errors.GatedRepoError as error:
            raise CheckpointError(f"{self}: gated; ask for access, then log in (`hf auth login`)") from error
        except errors.RepositoryNotFoundError as error:
            raise CheckpointError(f"{self}: no such repository, or a private one (`hf auth login`)") from error
        except errors.RevisionNotFoundError as error:
            raise CheckpointError(f"{self}: no such revision") from error
        except errors.EntryNotFoundError as error:
            raise _NoSuchFile(f"{self}: no such file") from error
        except errors.OfflineModeIsEnabled as error:
            raise _NotCached(f"{self}: HF_HUB_OFFLINE is set") from error
        except errors.HFValidationError as error:
            raise ArgumentError("path", "the name of a repository, owner/name", repr(self.repo)) from error
        except Exception as error:  # the library's and its HTTP client's many others
            status = getattr(getattr(error, "response", None), "status_code", None)
            said = f"HTTP status {status}" if status else getattr(error, "strerror", None) or type(error).__name__
            raise CheckpointError(f"{self}: the hub cannot be reached or refuses ({said})") from error


class _NotCached(CheckpointError):
    pass


class _NoSuchFile(CheckpointError):
    pass


def library() -> Any:
    """The module huggingface_hub. Raises BackendError that says how to install it."""
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise BackendError(
            "models on the Hugging Face Hub need huggingface_hub: pip install 'tarflow_fast[hub]'"
        ) from error
    return huggingface_hub


@dataclass(frozen=True)
class Url:
    """A file behind a URL. It is downloaded once, into torch.hub's cache folder."""

    url: str

    def fetch(self) -> tuple[Path, str]:
        """(the file in the cache, the URL with the file's SHA-256)."""
        name = urllib.parse.unquote(PurePosixPath(urllib.parse.urlsplit(self.url).path).name)
        name = re.sub(r"[^\w.+-]", "_", name)[-128:].lstrip(".") or "model"
        key = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        path = Path(torch.hub.get_dir()) / "tarflow_fast" / key / name
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial:
                self._download(partial)
        with path.open("rb") as file:
            return path, f"{self.url} (sha256 {hashlib.file_digest(file, 'sha256').hexdigest()})"

    def _download(self, path: Path) -> None:
        try:
            with urllib.request.urlopen(self.url, timeout=TIMEOUT) as answer, path.open("wb") as file:
                shutil.copyfileobj(answer, file, 1 << 20)
                wanted, got = answer.headers.get("Content-Length"), file.tell()
        except urllib.error.HTTPError as error:
            raise CheckpointError(f"{self.url}: HTTP status {error.code}") from error
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ValueError) as error:
            why = getattr(error, "reason", None)
            said = getattr(why, "strerror", None) or type(why or error).__name__
            raise CheckpointError(f"{self.url}: cannot be reached ({said}), and is not in the cache") from error
        if wanted is not None and wanted != str(got):
            raise CheckpointError(f"{self.url}: the connection ended early; try again")
