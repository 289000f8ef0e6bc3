"""The interface between models and sampling: a model's flow blocks in order, its prior, and how tokens become data.

A model is any object with a method `flow(device)` that returns a `Flow`. Engines, solvers and sampling know no more of
a model than that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .checks import WEIGHTS, check_count, check_floats, kind_of
from .engine.shape import BlockShape
from .engine.weights import BlockWeights
from .errors import ArgumentError
from .permutation import Permutation


@dataclass(frozen=True)
class Stage:
    """A stage is one flow block of a model, as its inverse needs it.

    Attributes:
        shape: The block's sizes.
        weights: A function that makes the block's weights; it is called when an engine packs them.
        order: The order in which the block reads the tokens of the data.
        start: (D,), a token of the block's own that stands before those of the data and passes unchanged, so that the
            first token of the data is transformed too. The block then has T + 1 tokens. None means that there is no
            such token, and the first token of the data passes unchanged.

    Raises:
        ArgumentError: A field is of another kind, or the order or the start token does not fit the sizes.
    """

    shape: BlockShape
    weights: Callable[[], BlockWeights]
    order: Permutation
    start: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.shape, BlockShape):
            raise ArgumentError("shape", "a BlockShape", kind_of(self.shape))
        if not callable(self.weights):
            raise ArgumentError("weights", "a function that makes the block's weights", kind_of(self.weights))
        if not isinstance(self.order, Permutation):
            raise ArgumentError("order", "a Permutation", kind_of(self.order))
        if self.start is not None:
            check_floats("start", self.start, (self.shape.token_dim,))
        if len(self.order.indices) != self.data_tokens:
            own = "" if self.start is None else ", one of the block's being its start token"
            expected = f"a Permutation of {self.data_tokens} tokens{own}"
            raise ArgumentError("order", expected, f"one of {len(self.order.indices)}")

    @property
    def data_tokens(self) -> int:
        """Returns T, the number of the data's tokens that the block takes."""
        return self.shape.tokens - (self.start is not None)

    def make_weights(self) -> BlockWeights:
        """Returns what `weights` makes. Raises ArgumentError unless these are weights of a block of this shape."""
        made = self.weights()
        if not isinstance(made, BlockWeights) or made.shape != self.shape:
            got = f"those of {made.shape}" if isinstance(made, BlockWeights) else kind_of(made)
            raise ArgumentError("weights", f"a function that makes the BlockWeights of {self.shape}", got)
        return made

    def enter(self, tokens: Tensor) -> Tensor:
        """Put the data's tokens in the order of the block, after its own start token if it has one.

        Args:
            tokens: (B, T, D) in the data's order.

        Returns:
            (B, T, D), or (B, T + 1, D) with a start token, in the block's order.
        """
        own = self.order.enter(tokens)
        if self.start is None:
            return own
        return torch.cat([self.start.to(own).expand(len(own), 1, -1), own], dim=1)

    def leave(self, tokens: Tensor) -> Tensor:
        """Invert `enter`: put the block's tokens in the data's order, without its start token.

        Args:
            tokens: (B, T', D) or (B, T') in the block's order, T' being T, or T + 1 with a start token.

        Returns:
            (B, T, D) or (B, T) in the data's order.
        """
        return self.order.leave(tokens if self.start is None else tokens[:, 1:])

    def enter_marks(self, marks: Tensor) -> Tensor:
        """Put numbers that belong to the data's tokens in the order of the block.

        Args:
            marks: (B, T), a number for each of the data's tokens.

        Returns:
            (B, T), or (B, T + 1) with a start token, whose number is 0.
        """
        own = self.order(marks)
        return own if self.start is None else torch.nn.functional.pad(own, (1, 0))


class Denoise(Protocol):
    """A function that returns x + scale · σ² ∇_x log p(x | y) for data x of shape (B, …).

    `models/denoising.py` describes the arguments.
    """

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

    Attributes:
        stages: The flow blocks in the order in which data go through them. Sampling goes the other way.
        prior_var: (T, D), the variance of the latents' normal distribution.
        data_shape: The shape of one of the data, such as (in_channels, H, W).
        to_tokens: A function from data (B, …) to tokens (B, T, D).
        to_data: The inverse of `to_tokens`.
        dtype: The dtype of the weights.
        device: The device of the weights.
        model: The model itself, from which copies and pickles of a sampler are made, or None, which leaves no way to
            make them.
        num_classes: The number of classes, 0 for an unconditional model.
        metadata: What the model records of itself, see `TarFlow.metadata`.
        denoise: Tweedie's step, or None where the model has none.
        check_unchanged: A function (thorough) that raises ArgumentError where weights that the flow shares with the
            model have changed since the flow was made. thorough: whether it reads them all.

    Raises:
        ArgumentError: A field is of another kind, or the prior, the blocks and the data do not fit each other. To see
            that, `to_data` is called once, for a single sample.
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
    check_unchanged: Callable[[bool], None] = lambda thorough: None

    def __post_init__(self) -> None:
        self._check_kinds()
        self._check_stages()
        self._check_data()

    def _check_kinds(self) -> None:
        """Raises ArgumentError for fields of another kind."""
        kinds: dict[str, tuple[bool, str]] = {
            "stages": (
                isinstance(self.stages, tuple) and all(isinstance(stage, Stage) for stage in self.stages),
                "a tuple of Stages",
            ),
            "dtype": (self.dtype in WEIGHTS, "one of " + ", ".join(map(str, WEIGHTS))),
            "device": (isinstance(self.device, torch.device), "a torch.device"),
            "metadata": (isinstance(self.metadata, dict), "a dict"),
            **{name: (callable(getattr(self, name)), "a function") for name in ("to_tokens", "to_data")},
            "denoise": (self.denoise is None or callable(self.denoise), "a function, or None"),
            "check_unchanged": (callable(self.check_unchanged), "a function"),
        }
        for name, (right, expected) in kinds.items():
            if not right:
                raise ArgumentError(name, expected, repr(getattr(self, name)))
        check_count("num_classes", self.num_classes, 0)

    def _check_stages(self) -> None:
        """Raises ArgumentError for no blocks, or a prior or classes that do not fit them."""
        if not self.stages:
            raise ArgumentError("stages", "at least one", "none")
        T, D = self.stages[0].data_tokens, self.stages[0].shape.token_dim
        prior = check_floats("prior_var", self.prior_var, (T, D))
        if not (prior > 0).all() or not prior.isfinite().all():
            raise ArgumentError("prior_var", "finite variances > 0", "others")
        for k, stage in enumerate(self.stages):
            found = (stage.data_tokens, stage.shape.token_dim)
            if found != (T, D):
                raise ArgumentError(
                    "stages", f"blocks of {T} tokens of {D} values, as the first", f"{found} in stage {k}"
                )
            if stage.shape.classes not in (0, self.num_classes):
                expected = f"blocks of num_classes = {self.num_classes} classes, or of none"
                raise ArgumentError("stages", expected, f"{stage.shape.classes} in stage {k}")

    def _check_data(self) -> None:
        """Raises ArgumentError where `to_data` does not make data of `data_shape` of tokens."""
        shape = self.data_shape
        if not isinstance(shape, tuple) or not shape or not all(type(side) is int and side >= 1 for side in shape):
            raise ArgumentError("data_shape", "a tuple of integers >= 1", repr(shape))
        with torch.no_grad():
            data = self.to_data(self.prior_var[None])
        if not isinstance(data, Tensor) or tuple(data.shape) != (1, *shape):
            got = tuple(data.shape) if isinstance(data, Tensor) else kind_of(data)
            raise ArgumentError("to_data", f"a function to (B, …) data of data_shape = {shape}", f"{got} with B = 1")

    @property
    def latent_shape(self) -> tuple[int, int]:
        """Returns (T, D), the number of the data's tokens and the size of each."""
        tokens, token_dim = self.prior_var.shape
        return tokens, token_dim

    @property
    def block_tokens(self) -> int:
        """Returns the number of tokens of all blocks together, for one of the data."""
        return sum(stage.shape.tokens for stage in self.stages)

    @property
    def class_names(self) -> list[str]:
        """Returns the class names that the model records, in the order of the classes; an empty list if it records
        none.
        """
        return known_names(self.metadata)


def known_names(metadata: Mapping[str, Any]) -> list[str]:
    """Returns the class names that a model records.

    Args:
        metadata: What a model records of itself.

    Returns:
        The names in the order of the classes; empty if there are none.
    """
    names = metadata.get("class_names")
    return [str(name) for name in names] if isinstance(names, (list, tuple)) else []


def check_flow_of(model: object) -> None:
    """Raises ArgumentError unless this is a flow, or a model that gives one, which then sees to its weights."""
    if isinstance(model, type) or not (isinstance(model, Flow) or callable(getattr(model, "flow", None))):
        raise ArgumentError("model", "a TarFlow (for ml-tarflow's own class use accelerate)", kind_of(model))
    for name, kind in (("device", torch.device), ("dtype", torch.dtype)):
        if not isinstance(getattr(model, name, None), kind):
            raise ArgumentError(
                "model", f"one with a {name}", f"{type(model).__name__}.{name} = {getattr(model, name, None)!r}"
            )
