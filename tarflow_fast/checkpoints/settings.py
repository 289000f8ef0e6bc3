"""What files say of a model besides its weights: sizes that weights leave open, noise and class names."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from .pickles import Foreign

NOISE_TYPES = ("gaussian", "uniform")
# Under which names training scripts keep their settings, ours and Lightning's among them.
_PLACES = ("config", "hyper_parameters", "model_config", "hparams", "args", "cfg", "params", "settings", "metadata")
_ALIASES = {"channel_size": "in_channels", "head_channels": "head_dim"}  # ml-tarflow's names


def check_metadata(metadata: Mapping[str, Any], num_classes: int) -> None:
    """Raises CheckpointError for noise or class names that no model of that many classes can have."""
    noise_type, noise_std = metadata.get("noise_type"), metadata.get("noise_std")
    if noise_type is not None and noise_type not in NOISE_TYPES:
        raise CheckpointError(f"noise_type: expected {' or '.join(map(repr, NOISE_TYPES))}, got {_cut(noise_type)}")
    if noise_std is not None and not is_noise(noise_std):
        raise CheckpointError(f"noise_std: expected a finite number >= 0, got {_cut(noise_std)}")
    names = metadata.get("class_names")
    if names is None:
        return
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name for name in names):
        raise CheckpointError(f"class_names: expected a list of names, got {_cut(names)}")
    if len(names) != num_classes:
        raise CheckpointError(f"class_names: expected {num_classes}, one for each class, got {len(names)}")


def is_noise(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


def _cut(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


def find_settings(tree: Any) -> dict[str, Any]:
    """patch_size, in_channels, head_dim, noise_type, noise_std and class_names from the settings beside the weights,
    where they have the right type. They are hints: sizes that do not fit the weights are not used."""
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
    if name in ("patch_size", "in_channels", "head_dim"):
        return type(value) is int and 0 < value < 2**31
    if name == "noise_std":
        return is_noise(value)
    if name == "class_names":
        return isinstance(value, (list, tuple)) and all(isinstance(item, str) and item for item in value)
    return name == "noise_type" and value in NOISE_TYPES


def _mapping(node: Any) -> Mapping[str, Any]:
    if isinstance(node, Foreign):
        return {**(node.state if isinstance(node.state, dict) else {}), **node.items}
    return node if isinstance(node, Mapping) else {}
