"""A state dict becomes a model: it is held to the sizes, read tensor by tensor, and put in place."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from .. import host_ops
from ..checks import WEIGHTS, short
from ..errors import CheckpointError, shown
from ..forking import safe_in_forked_child
from ..models.config import TarFlowConfig
from ..models.tarflow import TarFlow
from ..models.weight_laws import check_finite, check_masks, check_names, check_prior, is_mask
from .inference import Weights
from .stored import StoredTensor

MASK_ITEMSIZE = 8  # a value of a mask in a file has at most so many bytes


@safe_in_forked_child()
def build(
    state: Weights, config: TarFlowConfig, *, device: str | torch.device, dtype: torch.dtype, share: bool = False
) -> TarFlow:
    """Returns a model from a whole state dict: every key present, no other, right shapes, finite.

    state: the tensors by name; causal masks may be left out. config: the sizes. device, dtype: those of the model.
    share: whether tensors that are on this device in this dtype are taken as they are, and not copied. Raises
    CheckpointError for another state dict.
    """
    _check_keys(state, config)
    with torch.device("meta"):
        model = TarFlow.from_config(config)
    T = config.num_patches
    mask = torch.from_numpy(np.tri(T, T, dtype=np.float32)).to(device, dtype)
    check_masks(state, T, functools.partial(_read_mask, state))
    weights = {
        key: mask.clone() if is_mask(key) else _weight(key, state[key], device, dtype, share)
        for key in model.state_dict()
    }
    check_prior(weights["var"])
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_()


def _check_keys(state: Weights, config: TarFlowConfig) -> None:
    """Raises CheckpointError for wrong keys and shapes, before a model of these sizes is made.

    The shapes are those of one block of one layer, as all blocks are alike.
    """
    with torch.device("meta"):
        one = TarFlow.from_config(TarFlowConfig(**{**config.to_dict(), "num_blocks": 1, "layers_per_block": 1}))
    expected: dict[str, torch.Size] = {}
    for key, blank in one.state_dict().items():
        layers = config.layers_per_block if "attn_blocks.0." in key else 1
        for k in range(config.num_blocks if key.startswith("blocks.") else 1):
            for i in range(layers):
                name = key.replace("attn_blocks.0.", f"attn_blocks.{i}.").replace("blocks.0.", f"blocks.{k}.", 1)
                expected[name] = blank.shape
    check_names(state, expected)
    for key in filter(lambda key: not is_mask(key), expected):
        dtype = state[key].dtype
        if dtype not in WEIGHTS:
            got = short(dtype) if isinstance(dtype, torch.dtype) else shown(dtype)
            raise CheckpointError(f"{key}: expected floating-point weights, got {got}")


def _read_mask(state: Weights, key: str) -> Tensor:
    """Returns a mask of the right shape. Raises CheckpointError where more of its file would have to be read."""
    value = state[key]
    if isinstance(value, StoredTensor) and value.span > MASK_ITEMSIZE * value.numel:
        raise CheckpointError(f"{key}: its values lie far apart in the file; save a contiguous one")
    return _read(key, value)


def _read(key: str, value: Tensor | StoredTensor) -> Tensor:
    """Returns the tensor, read from its file if it is stored. Raises CheckpointError with its key where that fails."""
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
    """Returns a weight on this device in this dtype. Raises CheckpointError if it is not finite or overflows."""
    value = _read(key, value)
    check_finite(key, value)
    if share and (value.dtype, value.device) == (dtype, torch.device(device)) and not value.is_inference():
        return value
    weight, most = host_ops.converted(value, device, dtype), torch.finfo(dtype).max
    if most < torch.finfo(value.dtype).max and not host_ops.all_finite(weight):
        raise CheckpointError(
            f"{key}: expected weights up to {most:.3g} for {short(dtype)}, got {value.abs().max():.3g}"
        )
    return weight
