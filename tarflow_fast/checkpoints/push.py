"""This module uploads a model to the Hugging Face Hub."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ..errors import ArgumentError
from ..models.tarflow import TarFlow
from .hub import NAMES, HubFile, library, reference
from .writing import save


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
    """Uploads a model to the Hugging Face Hub, in one commit of `model.safetensors` and the card.

    Args:
        model: A TarFlow.
        repo_id: "owner/name", a repository that is made if it is not there.
        revision: The branch, by default the main one.
        private: Whether a repository that is made is private, by default as the hub decides.
        token: An access token, by default that of `hf auth login`.
        message: The message of the commit.
        card: The text of `README.md`, or True for `model_card(model)`, which leaves one that is there as it is; False
            uploads none.

    Returns:
        The model's name with the commit, as `load` takes it: "hf://owner/name@commit/model.safetensors".

    Raises:
        ArgumentError: `repo_id` is not of this form, or the model cannot be saved (see `save`).
        BackendError: huggingface_hub is not installed.
        CheckpointError: The hub cannot be reached, or refuses.
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
