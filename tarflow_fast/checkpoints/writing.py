"""A model is written to a file: `.safetensors` with its sizes and metadata, or `.pth` with its weights alone."""

from __future__ import annotations

import json
import os
import warnings
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from ..checks import WEIGHTS, check_weights, kind_of, short
from ..errors import ArgumentError, CheckpointError, TarFlowWarning, some
from ..files import check_path, replacing
from ..forking import safe_in_forked_child
from ..models.config import TarFlowConfig
from ..models.tarflow import TarFlow
from ..models.weight_laws import check_masks, is_mask
from .card import CARD, model_card
from .file_names import read_name
from .inference import HEAD_DIM, Weights, infer_config
from .safetensors_files import save_safetensors
from .settings import HEADER, check_metadata
from .stored import open_content
from .torch_files import save_torch


@safe_in_forked_child()
def save(
    model: TarFlow, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None, card: bool | str = False
) -> None:
    """Write a model: `.safetensors` (weights, configuration, metadata) or `.pth` (ml-tarflow's state dict alone).

    The file appears whole or not at all.

    Args:
        model: A TarFlow.
        path: The file, whose suffix says the format.
        dtype: The dtype of the stored floats, by default the model's own; `load` gives fp32 whatever is stored, unless
            told otherwise.
        card: Whether to write `README.md` beside the model too, as `model_card(model)`, or as this text. One that is
            there and was not written with a model is kept, and an error.

    Raises:
        ArgumentError: The suffix is another, the dtype is none of float16, bfloat16, float32 and float64, the weights
            overflow it or are not finite, a file cannot hold the model's metadata or its order of tokens, or another
            README.md is there.
        OSError: The system refuses; the error names the path.

    Warns:
        TarFlowWarning: A `.pth` leaves out what `load` would need; the warning says what.
    """
    if not isinstance(model, TarFlow):
        raise ArgumentError("model", "a TarFlow (save takes the model first, then the path)", kind_of(model))
    path = check_path("path", path, (".safetensors", ".pth"))
    check_weights(model)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in WEIGHTS):
        got = short(dtype) if isinstance(dtype, torch.dtype) else repr(dtype)
        raise ArgumentError("dtype", "one of " + ", ".join(f"torch.{short(each)}" for each in WEIGHTS), got)
    blocks: Any = model.blocks
    for k, block in enumerate(blocks):
        if block.permutation != model.config.permutation(k):
            expected = "blocks that read the tokens in turns from the first and from the last, as files tell no order"
            raise ArgumentError("model", expected, f"{block.permutation} in block {k}")
    text = _card_text(model, card)
    beside = None if text is None else _card_path(path, text)
    state = {
        key: (value.detach().to("cpu", dtype or value.dtype)).contiguous() for key, value in model.state_dict().items()
    }
    broken = [key for key, value in state.items() if not torch.isfinite(value).all()]
    if broken:
        raise ArgumentError("model", "finite weights" + (f" in {short(dtype)}" if dtype else ""), some(broken))
    try:
        check_masks(state, model.config.num_patches, state.__getitem__)
    except CheckpointError as error:
        raise ArgumentError("model", "a TarFlow as it was made", str(error)) from error
    record: dict[str, Any] = {"config": model.config.to_dict(), "metadata": model.metadata}
    if text is not None:
        record["card"] = sha256(text).hexdigest()
    try:
        check_metadata(model.metadata, model.config.num_classes)
        header = json.dumps(record)
    except (CheckpointError, TypeError, ValueError) as error:
        raise ArgumentError("model", "metadata that a file can hold", str(error)) from error
    lost = _lost(model.config, path.stem, state) if path.suffix.lower() == ".pth" else None
    if lost:
        said = f"{path}: a .pth holds weights alone; {lost} save as .safetensors, which records that"
        warnings.warn(said, TarFlowWarning, stacklevel=3)
    with replacing(path) as partial:
        if path.suffix.lower() == ".pth":
            save_torch(state, partial)
        else:
            weights = {key: value for key, value in state.items() if not is_mask(key)}
            save_safetensors(weights, {"format": "pt", HEADER: header}, partial)
    if beside is not None and text is not None:
        with replacing(beside) as partial:
            partial.write_bytes(text)


def _card_text(model: TarFlow, card: bool | str) -> bytes | None:
    """Returns the card as UTF-8, or None where none is to be written. Raises ArgumentError."""
    if card is False:
        return None
    if card is not True and not isinstance(card, str):
        raise ArgumentError("card", "a bool, or the text", kind_of(card))
    try:
        return (card if isinstance(card, str) else model_card(model)).encode()
    except UnicodeEncodeError as error:
        raise ArgumentError("card", "text that UTF-8 can hold", ascii(error.object[error.start : error.end])) from error


def _card_path(path: Path, text: bytes) -> Path:
    """Returns README.md beside the model. Raises ArgumentError if there is one that `save` has not written."""
    beside = check_path("card", path.with_name("README.md"))
    if beside.is_file():
        there = beside.read_bytes()
        if CARD.encode() not in there and there != text and sha256(there).hexdigest() != _recorded_card(path):
            raise ArgumentError("card", "no README.md of another kind beside the model", repr(str(beside)))
    return beside


def _recorded_card(path: Path) -> str | None:
    """Returns the SHA-256 of the card that was written with the model in this file, or None where it does not tell."""
    try:
        with ExitStack() as stack:
            record = json.loads(open_content(path, stack).header[HEADER])
        return str(record["card"])
    except (CheckpointError, LookupError, TypeError, ValueError, RecursionError):
        return None


def _lost(config: TarFlowConfig, stem: str, state: Weights) -> str:
    """What is to be done about what a `.pth` does not say of this model; empty where it says all."""
    if config.layout == "tokens":
        return "it is loaded as a model of images, not of sequences:"
    needed = ", ".join(f"{name}={value}" for name, value in _left_open(config, stem, state).items())
    return needed and f"load it with {needed}, or"


def _left_open(config: TarFlowConfig, stem: str, state: Weights) -> dict[str, Any]:
    """Returns what `load` has to be told, by the name of the argument, to get this model from its weights alone."""
    wanted: dict[str, Any] = {"patch_size": config.patch_size}
    if config.head_dim != HEAD_DIM:
        wanted["head_dim"] = config.head_dim
    if isinstance(config.img_size, tuple):
        wanted["img_size"] = config.img_size
    try:
        patch_size = read_name(stem, state).get("patch_size")
        guess = infer_config(state, patch_size=patch_size)
    except (CheckpointError, ArgumentError):
        return wanted
    return {name: value for name, value in wanted.items() if getattr(guess, name) != value}
