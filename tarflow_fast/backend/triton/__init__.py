"""The `triton` backend: a step of the token loop as a chain of fused kernels (`kernels/`).

Triton is imported when an engine is asked for, as it is not everywhere.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch

from ... import devices
from ...engine.backend import Backend, Maker, Request
from ...engine.contract import BlockEngine
from ...engine.weights import BlockWeights

if TYPE_CHECKING:
    from .workspace import Pool


def _missing(request: Request) -> str | None:
    unusable = devices.triton_missing()
    if unusable is not None:
        return unusable
    from .engine import triton_missing

    return triton_missing(request.device, request.dtype, request.compile)


def _maker(request: Request) -> Maker:
    from .engine import TritonEngine
    from .workspace import Pool

    pools: WeakValueDictionary[str, Pool] = WeakValueDictionary()  # one, kept by the engines that share it

    def make(weights: BlockWeights) -> BlockEngine:
        pool = pools.setdefault("model", Pool())
        return TritonEngine(weights, device=request.device, dtype=request.dtype, pool=pool)

    return make


def _describe(device: torch.device) -> str:
    return f"Triton {version('triton')} on {torch.cuda.get_device_name(device)}"


BACKEND = Backend("triton", ("cuda",), _missing, _maker, _describe)
