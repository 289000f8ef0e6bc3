"""The engine layer: an engine is the inverse of one flow block on one backend.

This package holds the contract that every engine meets, the sizes and weights of a block, and the choice among engines.
"""

from .contract import BlockEngine, BlockState, Condition, Guidance
from .shape import BlockShape
from .weights import BlockWeights, LayerWeights

__all__ = [
    "BlockEngine",
    "BlockShape",
    "BlockState",
    "BlockWeights",
    "Condition",
    "Guidance",
    "LayerWeights",
]
