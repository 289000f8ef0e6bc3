"""A file becomes a model: any file that holds a TarFlow's state dict is found, understood and loaded."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice, check_count, kind_of
from ..devices import check_device, check_dtype
from ..errors import ArgumentError, CheckpointError, TarFlowWarning, shown
from ..forking import safe_in_forked_child
from ..models.tarflow import TarFlow
from ..models.weight_laws import is_mask
from ..sizes import Size, checked_size
from . import hub
from .assembly import build
from .file_names import read_name
from .inference import fitting_patch, infer_config, open_sizes
from .settings import FAMILY_HEADER, check_metadata, find_settings, recorded
from .stored import INDEX, StoredTensor, open_content, read_json
from .weight_sets import choose

PRETRAINED = ("fashion_mnist",)
# Causal masks, T × T values a block, are made whether or not a file has them. A file may ask for so many values of
# them, or for so many times its weights if that is more.
_FREE_MASKS, _MASKS_TO_WEIGHTS = 2**26, 64


@dataclass(frozen=True)
class Origin:
    """An `Origin` tells where a model was loaded from.

    Attributes:
        path: The file; on a hub, its name with the commit.
        weights: The name of the set of weights that was taken.
    """

    path: str
    weights: str


@safe_in_forked_child()
def load(
    path: str | os.PathLike[str],
    *,
    weights: str | None = None,
    patch_size: Size | None = None,
    in_channels: int | None = None,
    head_dim: int | None = None,
    img_size: Size | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TarFlow:
    """Returns a model from a file: `.safetensors`, sharded or not, or whatever torch.save made of its state dict.

    The state dict may stand behind any prefix ("module.", "model.", …) and in dicts, as training code, Lightning and
    averages save it; the trainer's `checkpoint.pt` is one. No code of a file is run.

    Sizes are read off the weights. They tell in_channels·patch_size² but not its factors; these are, in this order,
    what is given here, what the file records, what a name in ml-tarflow's scheme says (`…_model_8_768_8_8_0.07.pth`:
    patch, width, blocks, layers, noise), what settings beside the weights say, else 3 channels if that makes the patch
    square, else 1.

    Args:
        path: A file; a folder that has `model.safetensors`, `model.safetensors.index.json` or another of the usual
            names; "hf://owner/name[@revision][/file]"; or an https URL. The last two are kept in a cache.
        weights: Which set is taken where a file holds several: its name, or "ema" or "model". By default it is the
            average, and a warning says so.
        patch_size: The height and width of a patch, as one number where it is a square.
        in_channels: The number of channels of an image.
        head_dim: The number of channels of an attention head, by default what the file records, else 64.
        img_size: The height and width of an image, by default what the file records, else those of a square.
        device: The device of the model.
        dtype: The dtype of the model, whatever the file stores.

    Returns:
        The model. Its `origin` says where it was found, its `metadata` what is known of noise and class names.

    Raises:
        ArgumentError: An argument has the wrong type or range, or does not fit the weights.
        BackendError: The device or dtype cannot be had, or huggingface_hub is needed and not installed.
        CheckpointError: The file is not a whole, finite TarFlow, or cannot be had; nothing half-loaded is returned.

    Warns:
        TarFlowWarning: There was a choice of weights or of sizes, and the warning says what was taken.
    """
    if not isinstance(path, (str, os.PathLike)) or isinstance(os.fspath(path), bytes):
        raise ArgumentError("path", "the path of a file, a folder, hf://owner/name or an https URL", kind_of(path))
    for name, count in {"in_channels": in_channels, "head_dim": head_dim}.items():
        if count is not None:
            check_count(name, count)
    given: dict[str, Any] = {"in_channels": in_channels, "head_dim": head_dim}
    for name, size in {"patch_size": patch_size, "img_size": img_size}.items():
        given[name] = None if size is None else checked_size(name, size)
    if weights is not None and not isinstance(weights, str):
        raise ArgumentError("weights", "the name of a set of weights", kind_of(weights))
    device = check_device(device)
    check_dtype(dtype, device)
    remote = hub.reference(os.fspath(path))
    file, source = remote.fetch() if remote is not None else (_file(Path(path)), os.path.abspath(path))
    try:
        with ExitStack() as stack:
            model, notes = _load(file, stack, weights, given, device, dtype, source)
    except ArgumentError as error:
        if error.argument == "weights" or given.get(error.argument) is not None:
            raise
        raise CheckpointError(f"{path}: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if notes:
        warnings.warn(f"{path}: {'; '.join(notes)}", TarFlowWarning, stacklevel=3)  # the decorator is between
    return model


def _load(
    file: Path,
    stack: ExitStack,
    weights: str | None,
    given: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    source: str,
) -> tuple[TarFlow, list[str]]:
    """Returns a model and notes on it. Raises CheckpointError and ArgumentError without the file's name."""
    content = open_content(file, stack)
    if FAMILY_HEADER in content.header:
        raise CheckpointError("no TarFlow, but a model of another family, which tarflow_fast.flows.load reads")
    taken, note = choose(content.tree, weights)
    notes = [note] if note else []
    state = _checked_tensors(taken.tensors)
    sizes, metadata = recorded(content.tree, content.header)
    named = read_name(file.stem.removesuffix(INDEX.removesuffix(".json")), state)
    hints = {**_beside(file), **find_settings(content.tree)}
    patch_size, in_channels = given["patch_size"], given["in_channels"]
    img_size, layout = given["img_size"], "image"
    if patch_size is None and in_channels is None and img_size is None:
        img_size, layout = sizes.get("img_size"), sizes.get("layout", layout)
    if patch_size is None and in_channels is None:
        patch_size = sizes.get("patch_size", named.get("patch_size"))
        in_channels = sizes.get("in_channels")
        if patch_size is None:
            patch_size = fitting_patch(state, hints)
        if patch_size is None:
            notes += open_sizes(state)
    elif sizes:  # sizes that are given overrule the file's
        sizes = {
            key: value for key, value in sizes.items() if key not in ("patch_size", "in_channels", "img_size", "layout")
        }
    head_dim = given["head_dim"] or sizes.get("head_dim") or hints.get("head_dim")
    config = infer_config(
        state,
        patch_size=patch_size,
        in_channels=in_channels,
        head_dim=head_dim,
        img_size=img_size,
        layout=layout,
    )
    for name, value in sizes.items():
        if name != "head_dim" and getattr(config, name) != value:
            raise CheckpointError(f"{name}: its weights have {getattr(config, name)}, its header says {value}")
    if not metadata:
        metadata = {key: hints[key] for key in ("noise_type", "noise_std", "class_names") if key in hints}
    check_metadata(metadata, config.num_classes)
    T, values = config.num_patches, sum(math.prod(value.shape) for key, value in state.items() if not is_mask(key))
    if config.num_blocks * T * T > max(_FREE_MASKS, _MASKS_TO_WEIGHTS * values):
        raise CheckpointError(f"blocks.0.pos_embed: {T} tokens are too many for a model of {values} weights")
    model = build(state, config, device=device, dtype=dtype)
    model.metadata = {**named.get("noise", {}), **metadata}
    model.origin = Origin(source, taken.name)
    return model, notes


def load_pretrained(name: str = "fashion_mnist", *, device: str | torch.device = "cpu") -> TarFlow:
    """Returns a model that ships with the package.

    Args:
        name: "fashion_mnist", a class-conditional model of 28×28 grey images of ten classes of garments.
        device: The device of the model.

    Returns:
        The model, in float32.

    Raises:
        ArgumentError: No model of that name ships with the package, or `device` is no device.
        BackendError: The device cannot be had.
    """
    check_choice("name", name, PRETRAINED)
    return load(Path(str(files("tarflow_fast") / "pretrained" / f"{name}.safetensors")), device=device)


def _checked_tensors(tensors: Mapping[str, Any]) -> dict[str, Tensor | StoredTensor]:
    """Returns the tensors of a file, which are really there: no size of a model is more than the file can hold.

    Raises CheckpointError for any others.
    """
    held = 0
    storages: dict[tuple[str, str], int] = {}
    for key, value in tensors.items():
        if not isinstance(value, StoredTensor):
            got = getattr(value, "name", type(value).__name__)
            raise CheckpointError(f"{shown(key)}: expected a state dict (names to dense tensors), got {shown(got)}")
        if is_mask(key):
            continue
        if value.broken or not value.numel:
            raise CheckpointError(f"{shown(key)}: {value.broken or f'empty, of shape {value.shape}'}")
        held += value.numel * (value.dtype.itemsize if isinstance(value.dtype, torch.dtype) else 0)
        storages[value.storage] = value.nbytes
    if held > sum(storages.values()):
        raise CheckpointError("its tensors share their values, so that the file holds fewer than it claims")
    return dict(tensors)


def _file(path: Path) -> Path:
    """Returns the file that a path means: itself, or what a folder of a model has. Raises CheckpointError."""
    if path.is_dir():
        for name in hub.NAMES:
            if (path / name).is_file():
                return path / name
        raise CheckpointError(f"{path}: a folder, and no such file in it as {' or '.join(hub.NAMES)}")
    if not path.is_file():
        raise CheckpointError(f"{path}: " + ("not a regular file" if path.exists() else "no such file"))
    return path


def _beside(file: Path) -> dict[str, Any]:
    """Returns settings from the config.json that huggingface_hub's mixin keeps beside `model.safetensors`."""
    config = file.with_name(hub.CONFIG)
    if file.name not in hub.NAMES or not config.is_file():
        return {}
    return find_settings({"config": read_json(config)})
