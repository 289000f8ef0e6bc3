"""A TarFlow's weights are found in what a file holds: under any prefix, beside others, in whatever wraps them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, CheckpointError, shown, some
from ..models.weight_laws import is_mask
from .pickles import Foreign

FIRST = "blocks.0.proj_in.weight"  # every TarFlow has it
OURS = "tarflow_fast"
_DEEPEST, _MOST = 6, 64  # dicts are searched so deep, and a file may have so many sets
_WRAPPERS = frozenset(("module", "_orig_mod", "state_dict", "_fsdp_wrapped_module"))  # these say nothing of a set
# These wrap a part of a model, as each block may be wrapped.
_INNER = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"))
_BLOCK = re.compile(r"((?:.*?\.)?blocks\.[0-9]+\.)(.+)", re.DOTALL)
_EMA = re.compile(r"(^|[^a-z])(ema|average[ds]?|avg|swa|shadow)([^a-z]|$)")
_OPTIMIZER = re.compile(r"optim|sched|scaler|exp_avg")


@dataclass(frozen=True)
class WeightSet:
    """A `WeightSet` is a state dict in a file.

    name: where the set lies, less prefixes that say nothing. prefix: the beginning of its keys as stored. tensors: the
    state dict, without the prefix. averaged: whether it is an average of weights.
    """

    name: str
    prefix: str
    tensors: dict[str, Any]
    averaged: bool


def split_prefix(state: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns (prefix, state dict without it) where a TarFlow's keys stand behind one prefix, such as "module.".

    It is ("", the same) where there is none, or more than one. What else the state dict holds is left out.
    """
    groups = _groups(state)
    if len(groups) != 1:
        return "", dict(state)
    ((prefix, tensors),) = groups.items()
    return prefix, tensors


def _groups(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns state dicts by the prefix of their keys. A key belongs to the longest prefix that it starts with."""
    if any(isinstance(key, str) and not _INNER.isdisjoint(key.split(".")) for key in state):
        state = _unwrapped(state)
    prefixes = sorted(
        {key[: -len(FIRST)] for key in state if isinstance(key, str) and (key == FIRST or key.endswith("." + FIRST))},
        key=len,
        reverse=True,
    )
    if len(prefixes) > _MOST:
        raise CheckpointError(f"more than {_MOST} sets of weights")
    groups: dict[str, dict[str, Any]] = {prefix: {} for prefix in reversed(prefixes)}
    for key, value in state.items():
        if isinstance(key, str):
            prefix = next((p for p in prefixes if key.startswith(p)), None)
            if prefix is not None:
                groups[prefix][key[len(prefix) :]] = value
    if "" in groups:  # what stands beside bare keys is the model's, unless it is no tensor
        groups[""] = {key: value for key, value in groups[""].items() if "." in key or _is_weight(key, value)}
    groups.update(_flattened(state, groups))
    return groups


def _unwrapped(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a state dict with keys that do not tell what wraps parts of blocks.

    "blocks.0._orig_mod.proj_in.weight" becomes the block's proj_in.weight.
    """
    out: dict[str, Any] = {}
    for key, value in state.items():
        match = _BLOCK.fullmatch(key) if isinstance(key, str) else None
        rest = [part for part in match[2].split(".") if part not in _INNER] if match else []
        name = match[1] + ".".join(rest) if match else key
        out[key if name in state and name != key else name] = value
    return out


def _is_weight(key: str, value: Any) -> bool:
    """Returns whether a bare key beside those of blocks is a weight of the model."""
    return key == "var" or (hasattr(value, "shape") and key != "n_averaged")


def _flattened(state: Mapping[str, Any], groups: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the averages that latent-diffusion's LitEma keeps beside a model: its names without dots, no buffers."""
    end = FIRST.replace(".", "")
    found = {}
    for prefix in [key[: -len(end)] for key in state if isinstance(key, str) and key.endswith("." + end)][:4]:
        for tensors in groups.values():
            names = [key for key in tensors if key != "var" and not is_mask(key)]
            if all(prefix + key.replace(".", "") in state for key in names):
                found[prefix] = {key: state[prefix + key.replace(".", "")] for key in names}
    return found


def find_sets(tree: Any) -> list[WeightSet]:
    """Returns every set of a TarFlow's weights in what a file holds.

    Raises CheckpointError, with advice, if there is none.
    """
    found: list[WeightSet] = []
    seen: set[int] = set()

    def search(node: Any, path: tuple[str, ...]) -> None:
        node = node.items if isinstance(node, Foreign) else node
        if not isinstance(node, Mapping) or id(node) in seen or len(path) > _DEEPEST:
            return
        seen.add(id(node))
        for prefix, tensors in _groups(node).items():
            parts = [*path, *prefix.split(".")]
            name = ".".join(part for part in parts if part and part not in _WRAPPERS) or "model"
            averaged = bool(_EMA.search(name.lower())) or "n_averaged" in node
            found.append(WeightSet(name, prefix, tensors, averaged))
            if len(found) > _MOST:
                raise CheckpointError(f"more than {_MOST} sets of weights")
        for key, value in node.items():
            if isinstance(key, str) and not _OPTIMIZER.search(key.lower()):
                search(value, (*path, key))

    search(tree, ())
    if not found:
        raise CheckpointError(_advice(tree))
    names = [each.name for each in found]
    return [
        each if names.count(each.name) == 1 else WeightSet(f"{each.name}#{i}", each.prefix, each.tensors, each.averaged)
        for i, each in enumerate(found)
    ]


def choose(tree: Any, weights: str | None) -> tuple[WeightSet, str | None]:
    """Returns a set of weights, and one sentence that says what was taken, or None where there was no choice.

    tree: what the file holds. weights: the name of a set, or "ema" or "model" for the one that is an average or is
    none; None takes the only set, or the only average. Raises ArgumentError for another name, and CheckpointError where
    there is no telling.
    """
    sets = find_sets(tree)
    names = ", ".join(repr(each.name) for each in sets)
    if weights is not None:
        fits = [each for each in sets if each.name == weights] or [
            each for each in sets if weights in ("ema", "model") and each.averaged == (weights == "ema")
        ]
        if len(fits) != 1:
            raise ArgumentError("weights", f"a set of weights that the file holds ({names})", repr(weights))
    else:
        fits = sets if len(sets) == 1 else [each for each in sets if each.averaged]
        if len(fits) != 1:
            raise CheckpointError(f"it holds several sets of weights, {names}; choose one by weights")
    taken = fits[0]
    others = [each for each in sets if each is not taken]
    buffers = next((each.tensors for each in others if not each.averaged), {})
    completed = dict(taken.tensors)
    if "var" not in completed and "var" in buffers:  # some averages are of parameters alone
        completed["var"] = buffers["var"]
    taken = WeightSet(taken.name, taken.prefix, completed, taken.averaged)
    if weights is not None:
        return taken, None
    if others:
        rest = ", ".join(repr(each.name) for each in others)
        return taken, f"its weights {taken.name!r} were taken, not {rest}; weights={others[0].name!r} takes those"
    unread = _unread_average(tree, taken)
    if unread is not None:
        return taken, f"its weights {taken.name!r} were taken; what it holds as {shown(unread)} is no whole state dict"
    return taken, None


def _unread_average(tree: Any, taken: WeightSet) -> str | None:
    """Returns the name of what seems to be an average, and is not the set that was taken; None if there is none."""
    if taken.averaged or not isinstance(tree, Mapping):
        return None
    for key, value in tree.items():
        first = key.partition(".")[0] if isinstance(key, str) else ""
        if _EMA.search(first.lower()) and (isinstance(value, (Mapping, list, Foreign)) or hasattr(value, "shape")):
            return first
    return None


def _whole(value: Foreign) -> str | None:
    """Returns what a whole module or sampler is that was pickled, and what to do with it; None for what is neither."""
    is_module = isinstance(value.state, dict) and "_modules" in value.state
    ours = value.name.startswith(f"{OURS}.")
    if not is_module and not (ours and value.name.endswith(".Sampler")):
        return None
    what = (
        f"a whole {'module' if is_module else 'sampler'}, {shown(value.name)}, pickled with its code, which is not run"
    )
    if not ours:
        return f"{what}: load it where its class is, and save torch.save(model.state_dict(), …)"
    model = "model" if is_module else "the model of which it was made"
    home = value.name.rpartition(".")[0]
    where = f"torch.load(…, weights_only=False) in the version of {OURS} that wrote it"
    gone = "" if _is_there(home) else f" (this one, {version(OURS)}, has no module {shown(home)})"
    return f"{what}: load it by {where}{gone}, and save {model} by {OURS}.save(model, 'model.safetensors')"


def _is_there(module: str) -> bool:
    """Returns whether this version has that module of ours, which is not imported."""
    parts = module.split(".")
    place = Path(__file__).parents[1].joinpath(*parts[1:])
    return all(map(str.isidentifier, parts)) and (place.with_suffix(".py").is_file() or place.is_dir())


def _advice(tree: Any) -> str:
    """Returns why there is no state dict of a TarFlow, and what to do."""
    if isinstance(tree, Foreign):
        whole = _whole(tree)
        if whole is not None:
            return whole
        return f"not a readable weights-only .pth file: it holds an object {shown(tree.name)}, which is not made"
    if not isinstance(tree, Mapping):
        return f"expected a state dict (names to tensors), got {type(tree).__name__}"
    for key, value in tree.items():
        whole = _whole(value) if isinstance(value, Foreign) else None
        if whole is not None:
            return f"its {shown(key)} is {whole}"
    foreign = [value.name for value in tree.values() if isinstance(value, Foreign)]
    start = "not a TarFlow"
    if foreign and not any(hasattr(value, "shape") or isinstance(value, Mapping) for value in tree.values()):
        start = f"not a readable weights-only .pth file: it holds objects ({some(foreign)}), which are not made, and is"
        start += " not a TarFlow"
    inner = [f"{key}: {some(list(map(str, v)))}" for key, v in tree.items() if isinstance(v, Mapping) and v]
    keys = some([str(key) for key in tree], 6) or "none"
    inside = f" (in {'; '.join(shown(text, 160) for text in inner[:2])})" if inner else ""
    return (
        f"{start}: no key {FIRST}, under any prefix. Keys found: {keys}{inside}. "
        "Save the model's own state dict: torch.save(model.state_dict(), …)"
    )
