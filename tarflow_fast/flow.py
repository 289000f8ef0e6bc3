"""What sampling needs of a model: its flow blocks in order, its prior, and how tokens become data.

A model is anything that has a method `flow(device)` which returns a `Flow`; nothing below knows more of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .engine.shape import BlockShape
from .engine.weights import BlockWeights
from .permutation import Permutation


@dataclass(frozen=True)
class Stage:
    """One flow block of a model, as its inverse needs it.

    shape: the block's sizes. weights: makes its weights, when an engine packs them. order: in which it reads the data's
    tokens. start: (D,), a token of the block's own that stands before the data's and passes unchanged, so that the
    first of these is transformed too; the block then has T + 1 tokens. None: the first of the data's passes unchanged.
    """

    shape: BlockShape
    weights: Callable[[], BlockWeights]
    order: Permutation
    start: Tensor | None = None

    def enter(self, tokens: Tensor) -> Tensor:
        """(B, T, D) in the data's order as the block's tokens, in its own."""
        own = self.order.enter(tokens)
        if self.start is None:
            return own
        return torch.cat([self.start.to(own).expand(len(own), 1, -1), own], dim=1)

    def leave(self, tokens: Tensor) -> Tensor:
        """The inverse of `enter`; also of what is (B, T) of a block's tokens."""
        return self.order.leave(tokens if self.start is None else tokens[:, 1:])

    def enter_marks(self, marks: Tensor) -> Tensor:
        """(B, T), a number for each of the data's tokens, in the block's order; 0 for a token of its own."""
        own = self.order(marks)
        return own if self.start is None else torch.nn.functional.pad(own, (1, 0))


class Denoise(Protocol):
    """x + scale · σ² ∇_x log p(x | y), of data (B, …); see `models/denoising.py` for the arguments."""

    def __call__(
        self,
        data: Tensor,
        labels: Tensor | None,
        *,
        noise_std: float | None,
        scale: float,
        batch_size: int | None,
        dtype: torch.dtype | None,
        backend: str,
        threads: int | None,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Flow:
    """A model as sampling takes it.

    stages: the flow blocks in the order in which data go through them; sampling goes the other way. prior_var: (T, D),
    the variance of the latents' normal distribution. data_shape: of one of the data, as (in_channels, H, W). to_tokens:
    data (B, …) to tokens (B, T, D); to_data: its inverse. dtype, device: of the weights. num_classes: 0 for an
    unconditional model. metadata: what the model records, as `TarFlow.metadata`. denoise: Tweedie's step, or None where
    the model has none. model: what the flow is of, kept for copies of a sampler. check_unchanged: raises ArgumentError
    where weights that the flow shares with the model have changed since.
    """

    stages: tuple[Stage, ...]
    prior_var: Tensor
    data_shape: tuple[int, ...]
    to_tokens: Callable[[Tensor], Tensor]
    to_data: Callable[[Tensor], Tensor]
    dtype: torch.dtype
    device: torch.device
    model: Any
    num_classes: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)
    denoise: Denoise | None = None
    check_unchanged: Callable[[], None] = lambda: None

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(T, D) of the data's tokens."""
        tokens, token_dim = self.prior_var.shape
        return tokens, token_dim

    @property
    def block_tokens(self) -> int:
        """Tokens of all blocks together, for one of the data."""
        return sum(stage.shape.tokens for stage in self.stages)

    @property
    def class_names(self) -> list[str]:
        return known_names(self.metadata)


def known_names(metadata: Mapping[str, Any]) -> list[str]:
    """The class names that a model records, in the order of the classes; none if there are none."""
    names = metadata.get("class_names")
    return [str(name) for name in names] if isinstance(names, (list, tuple)) else []
