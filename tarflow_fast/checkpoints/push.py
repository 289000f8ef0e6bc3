"""Uploading a model to the Hugging Face Hub."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ..errors import ArgumentError
from ..models.tarflow import TarFlow
from .checkpoint import save
from .hub import NAMES, HubFile, library, reference


def push_to_hub(
    model: TarFlow,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    message: str = "A TarFlow model",
    card: bool | str = True,
) -> str:
    """Uploads a model to the Hugging Face Hub, and returns its name with the commit, as `load` takes it.

    repo_id: "owner/name", made if it is not there. revision: a branch, default the main one. private: of a new
    repository. card: `README.md`, `model_card(model)` or this text; True keeps one that is there. token: default the
    one of `hf auth login`. It is one commit of `model.safetensors` and the card.
    """
    place = reference(f"hf://{repo_id}") if isinstance(repo_id, str) else None
    if not isinstance(place, HubFile) or place.file is not None or place.revision is not None:
        raise ArgumentError("repo_id", "owner/name", repr(repo_id))
    hub = library()
    api = hub.HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / NAMES[0], card=card)
        place.ask(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
        if card is True and place.ask(lambda: api.file_exists(repo_id, "README.md", revision=revision)):
            (Path(folder) / "README.md").unlink()
        done = place.ask(
            lambda: api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message)
        )
    return str(HubFile(repo_id, done.oid, NAMES[0]))
