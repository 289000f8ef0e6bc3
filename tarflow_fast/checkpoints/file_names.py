"""The published training script puts some of a model's settings into the name of its file."""

from __future__ import annotations

import re
from typing import Any

from .inference import Weights

# ml-tarflow's train.py names its files {dataset}_model_{patch}_{channels}_{blocks}_{layers}_{noise}.pth. Browsers and
# people put more behind that: what is listed here tells nothing else of a model, as another number would.
_ML_TARFLOW_NAME = re.compile(
    r"_model_([0-9]{1,9})_([0-9]{1,9})_[0-9]+_[0-9]+_(uniform|[0-9]{1,9}(?:\.[0-9]{1,9})?)"
    r"(?: ?\((?:[0-9]{1,9}|(?:another )?copy(?: [0-9]{1,9})?)\)"
    r"|(?: - |[ ._-])(?:copy|ema|average|avg|swa|best|last|latest|final|fp16|fp32|bf16|half|epoch|ep|step|steps|iter"
    r"|pth|pt|ckpt|safetensors)(?:[ ._=-]?[0-9]{1,9}(?:\.[0-9]{1,9})?)?)*$",
    re.IGNORECASE,
)


def read_name(stem: str, state: Weights) -> dict[str, Any]:
    """Returns patch size and noise from a name in ml-tarflow's scheme, if the width in it is that of the weights."""
    match = _ML_TARFLOW_NAME.search(stem)
    weight = state.get("blocks.0.proj_in.weight")
    if match is None or weight is None or weight.shape[:1] != (int(match[2]),):
        return {}
    if match[3].lower() == "uniform":
        return {"patch_size": int(match[1]), "noise": {"noise_type": "uniform"}}
    return {"patch_size": int(match[1]), "noise": {"noise_type": "gaussian", "noise_std": float(match[3])}}
