"""Reading and writing models: ml-tarflow's `.pth` state dicts, and `.safetensors` with the configuration inside."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from . import serial
from .checks import check_choice, check_count, short
from .config import TarFlowConfig
from .devices import check_device, check_dtype
from .errors import ArgumentError, CheckpointError, TarFlowError
from .files import check_path, replacing
from .forking import safe_in_forked_child
from .model import TarFlow

HEADER = "tarflow_fast"  # our entry in a safetensors file's metadata: JSON of {"config": …, "metadata": …}
PRETRAINED = ("fashion_mnist",)
# What DistributedDataParallel and torch.compile put before every key.
_WRAPPERS = ("module.", "_orig_mod.")
# {dataset}_model_{patch}_{channels}_{blocks}_{layers}_{noise}.pth, as ml-tarflow's train.py names its files
_ML_TARFLOW_NAME = re.compile(r"_model_(\d+)_(\d+)_(\d+)_(\d+)_(uniform|\d+(?:\.\d+)?)$")


@safe_in_forked_child()
def load(
    path: str | os.PathLike[str],
    *,
    patch_size: int | None = None,
    in_channels: int | None = None,
    head_dim: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TarFlow:
    """A model from ml-tarflow's `.pth` (a state dict, unpickled weights-only) or from our `.safetensors`.

    Sizes are read off the weights. They tell in_channels·patch_size² but not its factors; these are, in this order,
    what is given here, what the file records, what a name in ml-tarflow's scheme says
    (`…_model_8_768_8_8_0.07.pth`: patch, width, blocks, layers, noise), else 3 channels if that makes the patch
    square, else 1. head_dim: given, recorded, or 64. The model comes in `dtype` on `device`.

    Raises CheckpointError for a file that is not a whole, finite TarFlow; nothing half-loaded is returned.
    """
    path = Path(path)
    given = {"patch_size": patch_size, "in_channels": in_channels, "head_dim": head_dim}
    for name, value in given.items():
        if value is not None:
            check_count(name, value)
    device = check_device(device)
    check_dtype(dtype, device)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    state, recorded, metadata = _read(path)
    named = _read_name(path.stem, state)
    if patch_size is None and in_channels is None:
        patch_size = recorded.get("patch_size", named.get("patch_size"))
        in_channels = recorded.get("in_channels")
    elif recorded:  # what is given overrules the file
        recorded = {
            key: value for key, value in recorded.items() if key not in ("patch_size", "in_channels", "img_size")
        }
    recorded_head_dim = recorded.pop("head_dim", None)
    head_dim = recorded_head_dim if head_dim is None else head_dim
    try:
        config = infer_config(state, patch_size=patch_size, in_channels=in_channels, head_dim=head_dim)
        for name, value in recorded.items():
            if getattr(config, name) != value:
                raise CheckpointError(f"its weights have {name} {getattr(config, name)}, its header says {value}")
        model = build(state, config, device=device, dtype=dtype)
    except ArgumentError as error:
        if given.get(error.argument) is not None:
            raise
        raise CheckpointError(f"{path}: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    model.metadata = {**named.get("noise", {}), **metadata}
    return model


def load_pretrained(name: str = "fashion_mnist", *, device: str | torch.device = "cpu") -> TarFlow:
    """A model that ships with the package. "fashion_mnist": class-conditional, 28×28 grey, ten classes of garments."""
    check_choice("name", name, PRETRAINED)
    return load(Path(str(files("tarflow_fast") / "pretrained" / f"{name}.safetensors")), device=device)


@safe_in_forked_child()
def save(model: TarFlow, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> None:
    """Write a model: `.safetensors` (weights, configuration, model.metadata) or `.pth` (ml-tarflow's state dict alone).

    dtype: of the stored floats, default the model's own; `load` gives fp32 whatever is stored. The file appears whole
    or not at all. Raises ArgumentError for another suffix, or for a dtype that the weights overflow.
    """
    path = check_path("path", path, (".safetensors", ".pth"))
    state = {
        key: (value.detach().to("cpu", dtype or value.dtype)).contiguous() for key, value in model.state_dict().items()
    }
    broken = [key for key, value in state.items() if not torch.isfinite(value).all()]
    if broken:
        raise ArgumentError("model", "finite weights" + (f" in {short(dtype)}" if dtype else ""), _some(broken))
    with replacing(path) as partial:
        if path.suffix.lower() == ".pth":
            torch.save(state, partial)
        else:
            header = json.dumps({"config": model.config.to_dict(), "metadata": model.metadata})
            weights = {key: value for key, value in state.items() if not _is_mask(key)}
            safetensors.torch.save_file(weights, partial, {"format": "pt", HEADER: header})


def infer_config(
    state: Mapping[str, Tensor],
    *,
    patch_size: int | None = None,
    in_channels: int | None = None,
    head_dim: int | None = None,
) -> TarFlowConfig:
    """The sizes of an ml-tarflow state dict, by the rule in `load`. Raises CheckpointError or ArgumentError."""
    blocks = 1 + max((int(key.split(".")[1]) for key in state if re.match(r"blocks\.\d+\.", key)), default=-1)
    layers = 1 + max(
        (int(m[1]) for key in state if (m := re.match(r"blocks\.0\.attn_blocks\.(\d+)\.", key))), default=-1
    )
    needed = ("blocks.0.proj_in.weight", "blocks.0.proj_out.weight", "blocks.0.pos_embed")
    missing = [key for key in needed if key not in state]
    if missing or not layers:
        raise CheckpointError(f"not a TarFlow: no {_some(missing or ['blocks.0.attn_blocks.0'])}")
    for key in needed:
        if state[key].dim() != 2:
            raise CheckpointError(f"{key}: expected two dimensions, got shape {tuple(state[key].shape)}")
    (C, D), outputs, T = state[needed[0]].shape, state[needed[1]].shape[0], state[needed[2]].shape[0]
    if outputs not in (D, 2 * D):
        raise CheckpointError(f"blocks.0.proj_out.weight: expected {D} or {2 * D} rows, got {outputs}")
    side = math.isqrt(T)
    if side * side != T or T == 0:
        raise CheckpointError(f"blocks.0.pos_embed: expected a square number of tokens, got {T}")
    in_channels, patch_size = _split_token(D, in_channels, patch_size)
    classes = state.get("blocks.0.class_embed")
    return TarFlowConfig(
        in_channels=in_channels,
        img_size=side * patch_size,
        patch_size=patch_size,
        channels=C,
        num_blocks=blocks,
        layers_per_block=layers,
        nvp=outputs == 2 * D,
        num_classes=0 if classes is None else classes.shape[0],
        head_dim=64 if head_dim is None else head_dim,
    )


@safe_in_forked_child()
def build(
    state: Mapping[str, Tensor], config: TarFlowConfig, *, device: str | torch.device, dtype: torch.dtype
) -> TarFlow:
    """A model from a whole state dict: every key present, no other, right shapes, finite. Raises CheckpointError."""
    with torch.device("meta"):
        model = TarFlow.from_config(config)
    expected = model.state_dict()
    missing = [key for key in expected if key not in state and not _is_mask(key)]
    if missing:
        raise CheckpointError(f"incomplete: {len(missing)} tensors are missing, {_some(missing)}")
    foreign = [key for key in state if key not in expected]
    if foreign:
        raise CheckpointError(f"not a TarFlow of these sizes: {len(foreign)} unknown tensors, {_some(foreign)}")
    weights = {}
    for key, blank in expected.items():
        if _is_mask(key):
            weights[key] = torch.from_numpy(np.tri(*blank.shape, dtype=np.float32)).to(device, dtype)
            continue
        value = state[key]
        if value.shape != blank.shape:
            raise CheckpointError(f"{key}: expected shape {tuple(blank.shape)}, got {tuple(value.shape)}")
        if not value.is_floating_point():
            raise CheckpointError(f"{key}: expected floating-point weights, got {short(value.dtype)}")
        if not serial.all_finite(value):
            raise CheckpointError(f"{key}: expected finite weights, got infinities or NaNs")
        weights[key] = serial.converted(value, device, dtype)
    if not (weights["var"] > 0).all():
        raise CheckpointError("var: expected positive variances, got some <= 0")
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_()


def strip_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys without the prefixes that DistributedDataParallel and torch.compile add."""
    out = dict(state)
    for _ in _WRAPPERS:
        for prefix in _WRAPPERS:
            if out and all(key.startswith(prefix) for key in out):
                out = {key.removeprefix(prefix): value for key, value in out.items()}
    return out


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """(state dict, recorded configuration, metadata) of a file."""
    if path.suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get(HEADER, "{}"))
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            config = TarFlowConfig(**header["config"]).to_dict() if header else {}
            metadata = header.get("metadata", {})
            if not isinstance(metadata, dict):
                raise ValueError("the metadata in its header is not an object")
        except Exception as error:  # whatever a foreign or damaged file makes the parser raise
            raise CheckpointError(f"{path}: not a readable safetensors file ({_first_line(error)})") from error
        return strip_wrappers(state), config, metadata
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # as above
        raise CheckpointError(f"{path}: not a readable weights-only .pth file ({_first_line(error)})") from error
    for wrapper in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise CheckpointError(f"{path}: expected a state dict (names to tensors), got {type(content).__name__}")
    return strip_wrappers(content), {}, {}


def _read_name(stem: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Patch size and noise from a name in ml-tarflow's scheme, if the width in it is that of the weights."""
    match = _ML_TARFLOW_NAME.search(stem)
    weight = state.get("blocks.0.proj_in.weight")
    if match is None or weight is None or weight.shape[0] != int(match[2]):
        return {}
    if match[5] == "uniform":
        return {"patch_size": int(match[1]), "noise": {"noise_type": "uniform"}}
    return {"patch_size": int(match[1]), "noise": {"noise_type": "gaussian", "noise_std": float(match[5])}}


def _split_token(D: int, in_channels: int | None, patch_size: int | None) -> tuple[int, int]:
    """(in_channels, patch_size) with in_channels · patch_size² = D."""
    if patch_size is not None:
        if patch_size < 1 or D % patch_size**2:
            raise ArgumentError("patch_size", f"a patch size whose square divides the token size {D}", patch_size)
        if in_channels not in (None, D // patch_size**2):
            raise ArgumentError("in_channels", f"{D // patch_size**2} with patch_size {patch_size}", in_channels)
        return D // patch_size**2, patch_size
    for channels in (3, 1) if in_channels is None else (in_channels,):
        if channels > 0 and D % channels == 0 and math.isqrt(D // channels) ** 2 == D // channels:
            return channels, math.isqrt(D // channels)
    if in_channels is not None:
        raise ArgumentError("in_channels", f"a number that leaves a square patch of the token size {D}", in_channels)
    raise CheckpointError(f"a token has {D} values: neither 3 nor 1 channels of a square patch; give patch_size")


def _is_mask(key: str) -> bool:
    """The causal mask that ml-tarflow stores with every block: known without being read."""
    return key.endswith(".attn_mask")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200] if not isinstance(error, TarFlowError) else str(error)
