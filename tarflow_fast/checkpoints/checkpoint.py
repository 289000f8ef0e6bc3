"""Reading and writing models: any file with a TarFlow's state dict, and `.safetensors` that tells its sizes too."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import host_ops
from ..checks import WEIGHTS, check_choice, check_count, check_weights, short
from ..devices import check_device, check_dtype
from ..errors import ArgumentError, CheckpointError, TarFlowWarning
from ..files import check_path, replacing
from ..forking import safe_in_forked_child
from ..models.config import TarFlowConfig
from ..models.tarflow import TarFlow
from ..sizes import Size, checked_size, pair
from . import hub
from .card import CARD, model_card
from .safetensors_files import save_safetensors
from .settings import check_metadata, find_settings
from .stored import INDEX, StoredTensor, open_content, read_json
from .torch_files import save_torch
from .weight_sets import choose, is_mask, shown, some

HEADER = "tarflow_fast"  # our entry in a safetensors file's metadata: JSON of {"config": …, "metadata": …}
PRETRAINED = ("fashion_mnist",)
HEAD_DIM = 64  # of models that do not record it
# {dataset}_model_{patch}_{channels}_{blocks}_{layers}_{noise}.pth, as ml-tarflow's train.py names its files, and what
# browsers and people put behind that, which tells nothing else of a model. Another number would.
_ML_TARFLOW_NAME = re.compile(
    r"_model_([0-9]{1,9})_([0-9]{1,9})_[0-9]+_[0-9]+_(uniform|[0-9]{1,9}(?:\.[0-9]{1,9})?)"
    r"(?: ?\((?:[0-9]{1,9}|(?:another )?copy(?: [0-9]{1,9})?)\)"
    r"|(?: - |[ ._-])(?:copy|ema|average|avg|swa|best|last|latest|final|fp16|fp32|bf16|half|epoch|ep|step|steps|iter"
    r"|pth|pt|ckpt|safetensors)(?:[ ._=-]?[0-9]{1,9}(?:\.[0-9]{1,9})?)?)*$",
    re.IGNORECASE,
)
# Causal masks, T × T a block, are made, and what a file has of them is held against these: what a small file may ask
# for, and how many times its weights.
_FREE_MASKS, _MASKS_TO_WEIGHTS = 2**26, 64
MASK_ITEMSIZE = 8  # bytes of a value, at most

Weights = Mapping[str, Tensor | StoredTensor]


@dataclass(frozen=True)
class Origin:
    """Where a model was loaded from. path: the file; on a hub, with the commit. weights: the set that was taken."""

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
    """A model from a file: `.safetensors`, sharded or not, or whatever torch.save made of a TarFlow's state dict.

    path: of a file, of a folder that has `model.safetensors` or `model.safetensors.index.json`, or
    "hf://owner/name[@revision][/file]", or an https URL; the last two are kept in a cache. The state dict may stand
    behind any prefix ("module.", "model.", …) and in dicts, as training code, Lightning and averages save it; the
    trainer's `checkpoint.pt` is one. No code of a file is run. weights: which set, where a file holds several: a name,
    or "ema" or "model"; by default the average, and a TarFlowWarning says so.

    Sizes are read off the weights. They tell in_channels·patch_size² but not its factors; these are, in this order,
    what is given here, what the file records, what a name in ml-tarflow's scheme says
    (`…_model_8_768_8_8_0.07.pth`: patch, width, blocks, layers, noise), else 3 channels if that makes the patch
    square, else 1. head_dim: given, recorded, or 64. img_size: height and width, given, recorded, or those of a square.
    The model comes in `dtype` on `device`; its `origin` says where
    it was found, its `metadata` what is known of noise and class names.

    Raises CheckpointError for a file that is not a whole, finite TarFlow; nothing half-loaded is returned.
    """
    if not isinstance(path, (str, os.PathLike)) or isinstance(os.fspath(path), bytes):
        raise ArgumentError("path", "the path of a file, a folder, hf://owner/name or an https URL", _kind(path))
    for name, count in {"in_channels": in_channels, "head_dim": head_dim}.items():
        if count is not None:
            check_count(name, count)
    given: dict[str, Any] = {"in_channels": in_channels, "head_dim": head_dim}
    for name, size in {"patch_size": patch_size, "img_size": img_size}.items():
        given[name] = None if size is None else checked_size(name, size)
    if weights is not None and not isinstance(weights, str):
        raise ArgumentError("weights", "the name of a set of weights", _kind(weights))
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
    """(model, what is to be said of it). Raises CheckpointError and ArgumentError without the file's name."""
    content = open_content(file, stack)
    taken, note = choose(content.tree, weights)
    notes = [note] if note else []
    state = _checked_tensors(taken.tensors)
    sizes, metadata = _recorded(content.tree, content.header)
    named = _read_name(file.stem.removesuffix(INDEX.removesuffix(".json")), state)
    hints = {**_beside(file), **find_settings(content.tree)}
    patch_size, in_channels = given["patch_size"], given["in_channels"]
    img_size, layout = given["img_size"], "image"
    if patch_size is None and in_channels is None and img_size is None:
        img_size, layout = sizes.get("img_size"), sizes.get("layout", layout)
    if patch_size is None and in_channels is None:
        patch_size = sizes.get("patch_size", named.get("patch_size"))
        in_channels = sizes.get("in_channels")
        if patch_size is None:
            patch_size = _fitting_patch(state, hints)
        if patch_size is None:
            notes += _open_sizes(state)
    elif sizes:  # what is given overrules the file
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
    """A model that ships with the package. "fashion_mnist": class-conditional, 28×28 grey, ten classes of garments."""
    check_choice("name", name, PRETRAINED)
    return load(Path(str(files("tarflow_fast") / "pretrained" / f"{name}.safetensors")), device=device)


@safe_in_forked_child()
def save(
    model: TarFlow, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None, card: bool | str = False
) -> None:
    """Write a model: `.safetensors` (weights, configuration, model.metadata) or `.pth` (ml-tarflow's state dict alone).

    dtype: of the stored floats, default the model's own; `load` gives fp32 whatever is stored. card: also write
    `README.md` beside it, `model_card(model)` or this text; one that is there and was not written with a model is kept,
    and an error. The file appears whole or not at all. A TarFlowWarning says what a `.pth` leaves out that `load` would
    need.

    Raises ArgumentError for another suffix, or for a dtype that the weights overflow; OSError that names the path.
    """
    if not isinstance(model, TarFlow):
        raise ArgumentError("model", "a TarFlow (save takes the model first, then the path)", _kind(model))
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
        _check_masks(state, model.config.num_patches)
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
    if card is False:
        return None
    if card is not True and not isinstance(card, str):
        raise ArgumentError("card", "a bool, or the text", _kind(card))
    try:
        return (card if isinstance(card, str) else model_card(model)).encode()
    except UnicodeEncodeError as error:
        raise ArgumentError("card", "text that UTF-8 can hold", ascii(error.object[error.start : error.end])) from error


def _card_path(path: Path, text: bytes) -> Path:
    """README.md beside the model, if there is none or one that `save` has written."""
    beside = check_path("card", path.with_name("README.md"))
    if beside.is_file():
        there = beside.read_bytes()
        if CARD.encode() not in there and there != text and sha256(there).hexdigest() != _recorded_card(path):
            raise ArgumentError("card", "no README.md of another kind beside the model", repr(str(beside)))
    return beside


def _recorded_card(path: Path) -> str | None:
    """The SHA-256 of the card that was written with the model in this file, where it tells."""
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
    """What `load` has to be told to get this model from its weights alone."""
    wanted: dict[str, Any] = {"patch_size": config.patch_size}
    if config.head_dim != HEAD_DIM:
        wanted["head_dim"] = config.head_dim
    if isinstance(config.img_size, tuple):
        wanted["img_size"] = config.img_size
    try:
        patch_size = _read_name(stem, state).get("patch_size")
        guess = infer_config(state, patch_size=patch_size)
    except (CheckpointError, ArgumentError):
        return wanted
    return {name: value for name, value in wanted.items() if getattr(guess, name) != value}


def infer_config(
    state: Weights,
    *,
    patch_size: Size | None = None,
    in_channels: int | None = None,
    head_dim: int | None = None,
    img_size: Size | None = None,
    layout: str = "image",
) -> TarFlowConfig:
    """The sizes of an ml-tarflow state dict, by the rule in `load`. Raises CheckpointError or ArgumentError."""
    blocks = _count(state, re.compile(r"blocks\.([0-9]+)\."), "blocks")
    layers = _count(state, re.compile(r"blocks\.0\.attn_blocks\.([0-9]+)\."), "blocks.0.attn_blocks")
    needed = ("blocks.0.proj_in.weight", "blocks.0.proj_out.weight", "blocks.0.pos_embed")
    missing = [key for key in needed if key not in state]
    if missing or not layers:
        raise CheckpointError(f"not a TarFlow: no {some(missing or ['blocks.0.attn_blocks.0'])}")
    for key in needed:
        if len(state[key].shape) != 2:
            raise CheckpointError(f"{key}: expected two dimensions, got shape {tuple(state[key].shape)}")
    (C, D), outputs, T = state[needed[0]].shape, state[needed[1]].shape[0], state[needed[2]].shape[0]
    if outputs not in (D, 2 * D) or not D:
        raise CheckpointError(f"blocks.0.proj_out.weight: expected {D} or {2 * D} rows, got {outputs}")
    in_channels, patch_size = _split_token(D, in_channels, patch_size)
    img_size = _image_size(T, patch_size, img_size)
    classes = state.get("blocks.0.class_embed")
    if classes is not None and (len(classes.shape) != 3 or not classes.shape[0]):
        raise CheckpointError(f"blocks.0.class_embed: expected (classes, 1, {C}), got shape {tuple(classes.shape)}")
    if head_dim is None and C % HEAD_DIM:
        raise CheckpointError(
            f"its width {C} is no multiple of {HEAD_DIM}, and it does not record its heads; give head_dim"
        )
    return TarFlowConfig(
        in_channels=in_channels,
        img_size=img_size,
        patch_size=patch_size,
        channels=C,
        num_blocks=blocks,
        layers_per_block=layers,
        nvp=outputs == 2 * D,
        num_classes=0 if classes is None else classes.shape[0],
        head_dim=HEAD_DIM if head_dim is None else head_dim,
        layout=layout,
    )


def _image_size(T: int, patch_size: Size, img_size: Size | None) -> Size:
    """Height and width of an image of T patches: those given, if they fit, else those of a square."""
    rows, columns = pair(patch_size)
    if img_size is not None:
        height, width = pair(img_size)
        if height % rows or width % columns or height // rows * (width // columns) != T:
            raise ArgumentError("img_size", f"a size of {T} patches of {rows}×{columns}", img_size)
        return img_size
    side = math.isqrt(T)
    if side * side != T or T == 0:
        raise CheckpointError(f"blocks.0.pos_embed: expected a square number of tokens, got {T}; give img_size")
    return side * rows, side * columns


@safe_in_forked_child()
def build(
    state: Weights, config: TarFlowConfig, *, device: str | torch.device, dtype: torch.dtype, share: bool = False
) -> TarFlow:
    """A model from a whole state dict: every key present, no other, right shapes, finite. Raises CheckpointError.

    share: whether tensors that are on this device in this dtype are taken as they are, and not copied.
    """
    _check_keys(state, config)
    with torch.device("meta"):
        model = TarFlow.from_config(config)
    T = config.num_patches
    mask = torch.from_numpy(np.tri(T, T, dtype=np.float32)).to(device, dtype)
    _check_masks(state, T)
    weights = {
        key: mask.clone() if is_mask(key) else _weight(key, state[key], device, dtype, share)
        for key in model.state_dict()
    }
    if not (weights["var"] > 0).all():
        raise CheckpointError("var: expected positive variances, got some <= 0")
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_()


def _check_keys(state: Weights, config: TarFlowConfig) -> None:
    """Every key and shape, before a model of these sizes is made: by one block of one layer, as all are alike."""
    with torch.device("meta"):
        one = TarFlow.from_config(TarFlowConfig(**{**config.to_dict(), "num_blocks": 1, "layers_per_block": 1}))
    expected: dict[str, torch.Size] = {}
    for key, blank in one.state_dict().items():
        layers = config.layers_per_block if "attn_blocks.0." in key else 1
        for k in range(config.num_blocks if key.startswith("blocks.") else 1):
            for i in range(layers):
                name = key.replace("attn_blocks.0.", f"attn_blocks.{i}.").replace("blocks.0.", f"blocks.{k}.", 1)
                expected[name] = blank.shape
    missing = [key for key in expected if key not in state and not is_mask(key)]
    if missing:
        raise CheckpointError(f"incomplete: {len(missing)} tensors are missing, {some(missing)}")
    foreign = [key for key in state if key not in expected]
    if foreign:
        raise CheckpointError(f"not a TarFlow of these sizes: {len(foreign)} unknown tensors, {some(foreign)}")
    for key, shape in expected.items():
        if is_mask(key):
            continue
        value = state[key]
        if tuple(value.shape) != tuple(shape):
            raise CheckpointError(f"{key}: expected shape {tuple(shape)}, got {tuple(value.shape)}")
        if value.dtype not in WEIGHTS:
            got = short(value.dtype) if isinstance(value.dtype, torch.dtype) else shown(value.dtype)
            raise CheckpointError(f"{key}: expected floating-point weights, got {got}")


def _check_masks(state: Weights, T: int) -> None:
    """Raises CheckpointError for a mask that is not the causal one, (T, T): attention here looks at no other."""
    causal = np.tri(T, T, dtype=np.bool_)
    for key in filter(is_mask, state):
        value, got = state[key], f"shape {tuple(state[key].shape)}"
        if tuple(value.shape) == causal.shape:
            if isinstance(value, StoredTensor) and value.span > MASK_ITEMSIZE * causal.size:  # bounds what is read
                raise CheckpointError(f"{key}: its values lie far apart in the file; save a contiguous one")
            if np.array_equal(_read(key, value).to("cpu", torch.float32).numpy() != 0, causal):
                continue
            got = "another"
        raise CheckpointError(f"{key}: expected the causal mask, of shape {causal.shape}, got {got}")


def _read(key: str, value: Tensor | StoredTensor) -> Tensor:
    if not isinstance(value, StoredTensor):
        return value.detach()
    if value.broken:
        raise CheckpointError(f"{key}: {value.broken}")
    try:
        return value.read()
    except (ValueError, RuntimeError, OSError) as error:
        why = str(error) if type(error) is ValueError else "cannot be read"
        raise CheckpointError(f"{key}: {why}") from error


def _weight(
    key: str, value: Tensor | StoredTensor, device: str | torch.device, dtype: torch.dtype, share: bool
) -> Tensor:
    value = _read(key, value)
    if not host_ops.all_finite(value):
        raise CheckpointError(f"{key}: expected finite weights, got infinities or NaNs")
    if share and (value.dtype, value.device) == (dtype, torch.device(device)) and not value.is_inference():
        return value
    weight, most = host_ops.converted(value, device, dtype), torch.finfo(dtype).max
    if most < torch.finfo(value.dtype).max and not host_ops.all_finite(weight):
        raise CheckpointError(
            f"{key}: expected weights up to {most:.3g} for {short(dtype)}, got {value.abs().max():.3g}"
        )
    return weight


def _checked_tensors(tensors: Mapping[str, Any]) -> dict[str, Tensor | StoredTensor]:
    """Those of a file that are really there: no size of a model is more than the file can hold."""
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


def _recorded(tree: Any, header: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(sizes, metadata) as `save` and the trainer write them; empty if neither did."""
    if HEADER in header:
        try:
            record = json.loads(header[HEADER])
        except (ValueError, RecursionError) as error:
            raise CheckpointError("the header that tells its sizes is not JSON") from error
        sizes = record.get("config") if isinstance(record, dict) else None
        metadata = record.get("metadata", {}) if isinstance(record, dict) else None
    elif isinstance(tree, Mapping) and "fingerprint" in tree and "sizes" in tree:  # the trainer's
        sizes, metadata = tree["sizes"], tree.get("metadata", {})
    else:
        return {}, {}
    if not isinstance(metadata, dict):
        raise CheckpointError("the metadata that it records is not an object")
    try:
        return TarFlowConfig(**(sizes or {})).to_dict(), metadata
    except TypeError as error:  # names that no model has
        raise CheckpointError("the sizes that it records are not those of a TarFlow") from error


def _file(path: Path) -> Path:
    """The file that a path means: itself, or what a folder of a model has."""
    if path.is_dir():
        for name in hub.NAMES:
            if (path / name).is_file():
                return path / name
        raise CheckpointError(f"{path}: a folder, and no such file in it as {' or '.join(hub.NAMES)}")
    if not path.is_file():
        raise CheckpointError(f"{path}: " + ("not a regular file" if path.exists() else "no such file"))
    return path


def _beside(file: Path) -> dict[str, Any]:
    """Settings from the config.json that huggingface_hub's mixin keeps beside `model.safetensors`."""
    config = file.with_name(hub.CONFIG)
    if file.name not in hub.NAMES or not config.is_file():
        return {}
    return find_settings({"config": read_json(config)})


def _read_name(stem: str, state: Weights) -> dict[str, Any]:
    """Patch size and noise from a name in ml-tarflow's scheme, if the width in it is that of the weights."""
    match = _ML_TARFLOW_NAME.search(stem)
    weight = state.get("blocks.0.proj_in.weight")
    if match is None or weight is None or weight.shape[:1] != (int(match[2]),):
        return {}
    if match[3].lower() == "uniform":
        return {"patch_size": int(match[1]), "noise": {"noise_type": "uniform"}}
    return {"patch_size": int(match[1]), "noise": {"noise_type": "gaussian", "noise_std": float(match[3])}}


def _token_size(state: Weights) -> int:
    weight = state.get("blocks.0.proj_in.weight")
    return 0 if weight is None or len(weight.shape) != 2 else int(weight.shape[1])


def _fitting_patch(state: Weights, hints: Mapping[str, Any]) -> int | None:
    """The patch size of the settings beside the weights, if these can have it."""
    D, patch, channels = _token_size(state), hints.get("patch_size"), hints.get("in_channels")
    if patch is None and channels is not None and D % channels == 0:
        patch = math.isqrt(D // channels)
    if patch is None or not D or D % patch**2 or channels not in (None, D // patch**2):
        return None
    return int(patch)


def _open_sizes(state: Weights) -> list[str]:
    """What is to be said where the weights of a grey model are as well those of one of four channels, a latent's."""
    D = _token_size(state)
    side = math.isqrt(D)
    if side * side != D or side % 2:
        return []
    return [
        f"its weights leave open how many channels an image has; taken as 1, patches of {side}×{side} "
        f"(not 4, of {side // 2}×{side // 2}); patch_size or in_channels tells"
    ]


def _split_token(D: int, in_channels: int | None, patch_size: Size | None) -> tuple[int, Size]:
    """(in_channels, patch_size) of a token of D values."""
    if patch_size is not None:
        pixels = math.prod(pair(patch_size))
        if D % pixels:
            area = "square" if isinstance(patch_size, int) else "product"
            raise ArgumentError("patch_size", f"a patch size whose {area} divides the token size {D}", patch_size)
        if in_channels not in (None, D // pixels):
            raise ArgumentError("in_channels", f"{D // pixels} with patch_size {patch_size}", in_channels)
        return D // pixels, patch_size
    for channels in (3, 1) if in_channels is None else (in_channels,):
        if channels > 0 and D % channels == 0 and math.isqrt(D // channels) ** 2 == D // channels:
            return channels, math.isqrt(D // channels)
    if in_channels is not None:
        raise ArgumentError("in_channels", f"a number that leaves a square patch of the token size {D}", in_channels)
    raise CheckpointError(f"a token has {D} values: neither 3 nor 1 channels of a square patch; give patch_size")


def _count(state: Weights, pattern: re.Pattern[str], what: str) -> int:
    """How many there are, numbered from 0 without a gap."""
    numbers = {match[1] for key in state if (match := pattern.match(key))}
    missing = next((n for n in range(len(numbers)) if str(n) not in numbers), None)
    if missing is not None:
        raise CheckpointError(f"not a TarFlow: {what} are numbered with gaps, there is no {what}.{missing}")
    return len(numbers)


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__
