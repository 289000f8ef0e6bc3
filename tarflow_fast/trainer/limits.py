"""These functions tell what memory training takes at least, and check before any work that a machine has it."""

from __future__ import annotations

import torch

from ..devices import free_memory
from ..errors import OutOfMemoryError
from ..models.config import EXPANSION, TarFlowConfig

GB = 1e9
PARAMETER_BYTES = 20  # a parameter takes so many: fp32 weight, average, gradient and AdamW's two moments
MASK_BYTES = 8  # an element of the causal masks takes so many, as the average has them too
LAYER_VALUES = 12  # autograd keeps at least so many in a transformer layer for each channel of a token
LAYER_BYTES = 2  # such a value is bf16


def parameters(config: TarFlowConfig) -> int:
    """Returns how many parameters a model of these sizes has."""
    C, D, E = config.channels, config.token_dim, EXPANSION
    layer = (4 + 2 * E) * C * C + (9 + E) * C  # qkv, proj, up, down; their biases and two norms
    outputs = 2 * D if config.nvp else D
    embeddings = (config.num_patches + config.num_classes) * C
    block = (D + 1) * C + embeddings + config.layers_per_block * layer + (C + 1) * outputs
    return config.num_blocks * block


def check_fits(config: TarFlowConfig, rows: int, device: torch.device) -> None:
    """Raises OutOfMemoryError where a step of `rows` images surely takes more memory than the device has free."""
    free = free_memory(device)
    weights = PARAMETER_BYTES * parameters(config) + MASK_BYTES * config.num_blocks * config.num_patches**2
    layers = config.num_blocks * config.layers_per_block
    image = LAYER_BYTES * LAYER_VALUES * layers * config.num_patches * config.channels
    if weights > free:
        raise OutOfMemoryError(
            f"a model of {parameters(config):,} parameters and {config.num_patches:,} tokens takes at least "
            f"{weights / GB:,.1f} GB to train; {device} has {free / GB:.1f} GB free"
        )
    if weights + rows * image > free:
        raise OutOfMemoryError(
            f"a step of {rows:,} {config.kind} takes at least {(weights + rows * image) / GB:,.1f} GB; {device} has "
            f"{free / GB:.1f} GB free, enough for batches of less than {max(1, (free - weights) // image):,}"
        )
