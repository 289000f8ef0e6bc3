"""A model of a family is kept in one safetensors file, whose metadata say how to build it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..checkpoints.safetensors_files import save_safetensors
from ..checkpoints.settings import FAMILY_HEADER
from ..checks import kind_of
from ..devices import check_device
from ..errors import ArgumentError, BackendError, CheckpointError, first_line
from ..files import PathLike, check_path, replacing
from .base import FamilyFlow
from .options import read_options
from .preprocessing import Preprocessed
from .registry import FAMILIES, build, known_one


def describe(model: FamilyFlow) -> dict[str, Any]:
    """Returns what `build` needs to make a model like this one, and its metadata."""
    flow = model.flow if isinstance(model, Preprocessed) else model
    return {
        "family": flow.name,
        "data_shape": list(flow.data_shape),
        "num_classes": flow.num_classes,
        "options": asdict(flow.options),
        "preprocessing": asdict(model.options) if isinstance(model, Preprocessed) else None,
        "metadata": model.metadata,
    }


def rebuild(record: dict[str, Any]) -> FamilyFlow:
    """Returns a model with random weights, of what `describe` wrote. Raises ArgumentError for what no family takes."""
    shape, classes = record["data_shape"], record["num_classes"]
    kind = FAMILIES[known_one("name", record["family"], FAMILIES)].load()
    idle = kind.idle_options(tuple(shape), read_options(record["family"], kind.Options, record["options"]))
    options = {name: value for name, value in record["options"].items() if name not in idle}
    model = build(record["family"], data_shape=shape, num_classes=classes, **options)
    if record["preprocessing"] is not None:
        model = Preprocessed(model, read_options("preprocessing", Preprocessed.Options, record["preprocessing"]))
    model.metadata = dict(record["metadata"])
    return model


def save(model: FamilyFlow, path: PathLike) -> None:
    """Writes a model: its weights, and as metadata its family, shape, options and preprocessing.

    The file appears whole or not at all.

    Args:
        model: A model of a family.
        path: A file that ends in .safetensors.

    Raises:
        ArgumentError: It is no model that `build` made, its weights are not finite, or the suffix is another.
        OSError: The system refuses.
    """
    if not isinstance(model, FamilyFlow) or not model.name:
        raise ArgumentError("model", "a model of tarflow_fast.flows.build", kind_of(model))
    path = check_path("path", path, (".safetensors",))
    state = {name: value.detach().to("cpu").contiguous() for name, value in model.state_dict().items()}
    if broken := _not_finite(model):
        raise ArgumentError("model", "finite weights", broken)
    with replacing(path) as partial:
        save_safetensors(state, {"format": "pt", FAMILY_HEADER: json.dumps(describe(model))}, partial)


def load(path: PathLike, *, device: str | torch.device = "cpu") -> FamilyFlow:
    """Returns a model that `save` wrote, in evaluation mode.

    Args:
        path: The file.
        device: The device of the model.

    Raises:
        BackendError: The device, or a library of which the family is made, cannot be had.
        CheckpointError: The file is no whole, finite model of a family.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ArgumentError("path", "the path of a .safetensors file", kind_of(path))
    device = check_device(device)
    try:
        with safe_open(Path(path), "pt") as file:
            header = (file.metadata() or {}).get(FAMILY_HEADER)
            if header is None:
                raise CheckpointError("it is no model of a family of tarflow_fast.flows")
            model = rebuild(json.loads(header))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        first = next(name for name, _ in model.named_parameters())
        model.to(state[first].dtype).load_state_dict(state)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except BackendError:
        raise
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {first_line(error)}") from error
    if broken := _not_finite(model):
        raise CheckpointError(f"{path}: {broken} is not finite")
    return model.to(device).eval()


def is_family(path: PathLike) -> bool:
    """Returns whether a file is a safetensors file that holds a model of a family."""
    try:
        with safe_open(Path(path), "pt") as file:
            return FAMILY_HEADER in (file.metadata() or {})
    except (SafetensorError, OSError, ValueError):
        return False


def _not_finite(model: FamilyFlow) -> str | None:
    """Returns the name of the first parameter that has an infinity or a NaN, or None."""
    return next((name for name, value in model.named_parameters() if not torch.isfinite(value).all()), None)
