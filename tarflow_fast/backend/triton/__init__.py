"""The `triton` backend: a step of the token loop as a chain of fused kernels (`kernels/`).

Triton is imported only when an engine is asked for, because not every platform has it.
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

    pools: WeakValueDictionary[str, Pool] = WeakValueDictionary()  # one pool, kept alive by the engines that share it

    def make(weights: BlockWeights) -> BlockEngine:
        pool = pools.setdefault("model", Pool())
        return TritonEngine(weights, device=request.device, dtype=request.dtype, pool=pool)

    return make


def _describe(device: torch.device) -> str:
    return f"Triton {version('triton')} on {torch.cuda.get_device_name(device)}"


def _variants(request: Request) -> dict[str, Maker]:
    """Returns engines without programmatic dependent launch, where the device has it."""
    from .engine import TritonEngine, dependent_launch

    if not dependent_launch(request.device):
        return {}
    return {"without PDL": lambda weights: TritonEngine(weights, device=request.device, dtype=request.dtype, pdl=False)}


BACKEND = Backend("triton", ("cuda",), _missing, _maker, _describe, probed=True, variants=_variants)
