"""Engines invert one flow block on one backend. `contract.py` says how; `registry.py` says which there are."""

from .contract import BlockEngine, BlockState, Condition, Guidance
from .fastest import FastestEngine
from .registry import BackendStatus, backends, check_compile, check_threads, choose_backend, make_engines
from .shape import BlockShape
from .weights import BlockWeights, LayerWeights

__all__ = [
    "BackendStatus",
    "BlockEngine",
    "BlockShape",
    "BlockState",
    "BlockWeights",
    "Condition",
    "FastestEngine",
    "Guidance",
    "LayerWeights",
    "backends",
    "check_compile",
    "check_threads",
    "choose_backend",
    "make_engines",
]
