"""Engines invert one flow block on one backend. `contract.py` says how; `registry.py` says which there are."""

from .contract import BlockEngine, BlockState, Condition, Guidance
from .fastest import FastestEngine
from .registry import BackendStatus, backends, check_compile, check_threads, choose_backend, make_engines
from .weights import BlockWeights, block_weights

__all__ = [
    "BackendStatus",
    "BlockEngine",
    "BlockState",
    "BlockWeights",
    "Condition",
    "FastestEngine",
    "Guidance",
    "backends",
    "block_weights",
    "check_compile",
    "check_threads",
    "choose_backend",
    "make_engines",
]
