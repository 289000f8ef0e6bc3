"""What an engine is, the inverse of one flow block on one backend: the contract, the sizes and weights of a block."""

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
