"""Files say more of a model than its weights do: sizes that weights leave open, noise and class names."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from ..errors import ArgumentError, CheckpointError
from ..models.config import TarFlowConfig
from ..sampling.rule import CHECKS
from .pickles import Foreign

HEADER = "tarflow_fast"  # this entry of a safetensors file's metadata is ours: JSON of {"config": …, "metadata": …}
FAMILY_HEADER = "tarflow_fast.flows"  # this entry is that of a model of another family, which is no TarFlow
NOISE_TYPES = ("gaussian", "uniform")
# Training scripts keep their settings under these names, ours and Lightning's among them.
_PLACES = ("config", "hyper_parameters", "model_config", "hparams", "args", "cfg", "params", "settings", "metadata")
_ALIASES = {"channel_size": "in_channels", "head_channels": "head_dim"}  # ml-tarflow's names come first here


def check_metadata(metadata: Mapping[str, Any], num_classes: int) -> None:
    """Raises CheckpointError for noise, class names or defaults of sampling that no model of that many classes has."""
    noise_type, noise_std = metadata.get("noise_type"), metadata.get("noise_std")
    if noise_type is not None and noise_type not in NOISE_TYPES:
        raise CheckpointError(f"noise_type: expected {' or '.join(map(repr, NOISE_TYPES))}, got {_cut(noise_type)}")
    if noise_std is not None and not is_noise(noise_std):
        raise CheckpointError(f"noise_std: expected a finite number >= 0, got {_cut(noise_std)}")
    if "sampling" in metadata:
        _check_sampling(metadata["sampling"], noisy=bool(noise_std) and noise_type != "uniform")
    names = metadata.get("class_names")
    if names is None:
        return
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name for name in names):
        raise CheckpointError(f"class_names: expected a list of names, got {_cut(names)}")
    if len(names) != num_classes:
        raise CheckpointError(f"class_names: expected {num_classes}, one for each class, got {len(names)}")


def _check_sampling(sampling: Any, noisy: bool) -> None:
    """Raises CheckpointError for defaults of sampling that `Sampler.sample` would not take.

    noisy: whether the noise is recorded that denoising takes off.
    """
    if not isinstance(sampling, Mapping) or not sampling.keys() <= CHECKS.keys():
        raise CheckpointError(f"sampling: expected values of {', '.join(CHECKS)}, got {_cut(sampling)}")
    for name, value in sampling.items():
        try:
            CHECKS[name](name, value)
        except ArgumentError as error:
            raise CheckpointError(f"sampling: {name}: expected {error.expected}, got {_cut(value)}") from error
    if sampling.get("denoise") and not noisy:
        raise CheckpointError("sampling: denoise: expected False, as no noise_std > 0 is recorded, got True")


def is_noise(value: object) -> bool:
    """Returns whether a value can be the standard deviation of noise: a finite number >= 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


def _cut(value: object) -> str:
    """Returns what the value looks like, in at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


def recorded(tree: Any, header: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns sizes and metadata as `save` and the trainer write them, which are empty if neither did."""
    if HEADER in header:
        try:
            record = json.loads(header[HEADER])
        except (ValueError, RecursionError) as error:
            raise CheckpointError("the header that tells its sizes is not JSON") from error
        sizes = record.get("config") if isinstance(record, dict) else None
        metadata = record.get("metadata", {}) if isinstance(record, dict) else None
    elif isinstance(tree, Mapping) and "fingerprint" in tree and "sizes" in tree:  # the trainer's checkpoint has both
        sizes, metadata = tree["sizes"], tree.get("metadata", {})
    else:
        return {}, {}
    if not isinstance(metadata, dict):
        raise CheckpointError("the metadata that it records is not an object")
    try:
        return TarFlowConfig(**(sizes or {})).to_dict(), metadata
    except TypeError as error:  # some name is one that no model has
        raise CheckpointError("the sizes that it records are not those of a TarFlow") from error


def find_settings(tree: Any) -> dict[str, Any]:
    """Returns what the settings beside the weights say of a model, by name, where it has the right type.

    The names are patch_size, in_channels, head_dim, noise_type, noise_std and class_names. The sizes are hints: those
    that do not fit the weights are not used.
    """
    found: dict[str, Any] = {}
    for place in _PLACES:
        settings = _mapping(_mapping(tree).get(place))
        for inner in (*(_mapping(settings.get(key)) for key in ("model", "metadata")), settings):
            for key, value in inner.items():
                name = _ALIASES.get(key, key) if isinstance(key, str) else ""
                if _is_setting(name, value):
                    found.setdefault(name, list(value) if name == "class_names" else value)
    if "noise_std" in found and "noise_type" not in found and found["noise_std"] > 0:
        found["noise_type"] = "gaussian"
    if found.get("noise_type") == "uniform":
        found.pop("noise_std", None)
    return found


def _is_setting(name: str, value: Any) -> bool:
    """Returns whether a setting of this name can have this value."""
    if name in ("patch_size", "in_channels", "head_dim"):
        return type(value) is int and 0 < value < 2**31
    if name == "noise_std":
        return is_noise(value)
    if name == "class_names":
        return isinstance(value, (list, tuple)) and all(isinstance(item, str) and item for item in value)
    return name == "noise_type" and value in NOISE_TYPES


def _mapping(node: Any) -> Mapping[str, Any]:
    """Returns a node of a file's tree as a mapping, which is empty if it is none."""
    if isinstance(node, Foreign):
        return {**(node.state if isinstance(node.state, dict) else {}), **node.items}
    return node if isinstance(node, Mapping) else {}
