"""The contract that every backend meets: how a flow block is inverted, and the state in which that is done.

Backends know nothing of solvers, and solvers know nothing of backends. A solver is given a `BlockEngine` and a
`BlockState`, and calls the two passes that are defined below. All tensors are in the block's own token order; the
caller of the engine permutes them. The parameters (xa, xb) that transform token i come from the tokens before it:

    x_0 = z_0,    x_i = z_i · exp(xa_{i−1}) + xb_{i−1},    log|det dx/dz| = Σ_i Σ_d xa_{i−1}
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from .. import host_ops
from ..checks import GUIDE_WHAT, check_choice, check_number
from ..errors import ArgumentError
from ..scalars import check_flag
from .shape import BlockShape
from .windows import Bounds

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (arXiv 2412.06329, section 3.5):

        xa ← xa + g_i (xa − xa_u),    xb ← xb + g_i (xb − xb_u)

    where (xa_u, xb_u) are the parameters of the unguided branch.

    Attributes:
        scale: The weight w >= 0. With 0 there is no guidance, and no unguided branch.
        what: Which parameters are guided: "a" for xa, "b" for xb, or "ab" for both.
        attn_temp: A temperature > 0 that divides the attention logits of the unguided branch.
        annealed: Whether g_i = w · (i+1)/(T−1) for the parameters after token i, instead of g_i = w.

    Raises:
        ArgumentError: A value is of another type or out of range.
    """

    scale: float = 0.0
    what: str = "ab"
    attn_temp: float = 1.0
    annealed: bool = False

    def __post_init__(self) -> None:
        checked = {
            "scale": check_number("guidance", self.scale, 0),
            "what": check_choice(
                "guide_what", "ab" if isinstance(self.what, str) and self.what == "ba" else self.what, GUIDE_WHAT
            ),
            "attn_temp": check_number("attn_temp", self.attn_temp, 0, open_low=True),
            "annealed": check_flag("annealed_guidance", self.annealed),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def active(self) -> bool:
        """Returns whether there is guidance, and so an unguided branch beside the guided one."""
        return self.scale > 0

    def schedule(self, tokens: int) -> list[float]:
        """Returns g_i for i = 0 … T−2, where `tokens` is T."""
        if not self.annealed:
            return [float(self.scale)] * (tokens - 1)
        return [self.scale * (i + 1) / (tokens - 1) for i in range(tokens - 1)]


@dataclass(frozen=True)
class Condition:
    """The labels and the guidance that a batch is conditioned on.

    Attributes:
        labels: (B,) int64, the class of each sample, with -1 for no class. None means no class for all samples.
        guidance: The guidance, by default none.

    Raises:
        ArgumentError: A field is of another kind.
    """

    labels: Tensor | None = None
    guidance: Guidance = field(default_factory=Guidance)

    def __post_init__(self) -> None:
        if self.labels is not None and not isinstance(self.labels, Tensor):
            raise ArgumentError("labels", "a tensor (B,) of int64, or None", repr(self.labels))
        if not isinstance(self.guidance, Guidance):
            raise ArgumentError("guidance", "a Guidance", repr(self.guidance))


@dataclass
class BlockState:
    """The state of one batch inside one flow block.

    Attributes:
        z: (B, T, D), the latents, which are never written.
        x: (B, T, D), the tokens. It begins as a copy of z. Token 0 stays equal to z[:, 0], and the engine fills in the
            others.
        token_log_det: (B, T), Σ_d xa of the parameters that made each token, in nats of dx/dz; 0 for token 0.
        condition: The labels and the guidance of the batch.
        cache: The engine's own memory: keys, values and scratch.
        cache_bytes: The size of the KV cache in bytes.
        nonfinite: The result of `first_nonfinite` where the engine found it on the way, else None.
        delegate: The name and the engine that serve this batch where one of several was chosen (`autotune.py`), else
            None.
    """

    z: Tensor
    x: Tensor
    token_log_det: Tensor
    condition: Condition
    cache: Any
    cache_bytes: int
    nonfinite: Tensor | None = None
    delegate: tuple[str, BlockEngine] | None = None

    @property
    def log_det(self) -> Tensor:
        """Returns log|det dx/dz|, (B,), in nats."""
        return self.token_log_det.sum(1)

    def first_nonfinite(self) -> Tensor:
        """Returns the first token of each sample that has an infinity or a NaN, (B,) integers; T where no token has."""
        if self.nonfinite is not None:
            return self.nonfinite
        bad = ~host_ops.all_finite(self.x, 2)
        return torch.where(bad.any(1), bad.int().argmax(1), self.x.shape[1])


class Moved(NamedTuple):
    """The movements of the tokens of a window in one parallel pass.

    A value is NaN or infinite where the token is.

    Attributes:
        change: (B, W), max_d |new x − old x|.
        residual: (B, W), max_d |forward(old x) − z| = max_d |new x − old x| · exp(−xa).
    """

    change: Tensor
    residual: Tensor


class BlockEngine(Protocol):
    """One flow block on one backend, whose weights are packed once, at construction."""

    @property
    def dtype(self) -> torch.dtype:
        """Returns the dtype of weights and KV cache."""
        ...

    @property
    def setup_seconds(self) -> float:
        """Returns the seconds spent so far on what is done once for a shape, such as compiling or capturing graphs."""
        ...

    @property
    def ragged(self) -> bool:
        """Returns whether `fixed_point` takes a window for each sample."""
        ...

    @property
    def cached_bytes(self) -> int:
        """Returns the bytes of memory that are held for later batches and that `empty_cache` frees."""
        ...

    def empty_cache(self) -> None:
        """Free the memory that `cached_bytes` counts."""
        ...

    def begin(self, z: Tensor, condition: Condition, reuse: BlockState | None = None) -> BlockState:
        """Allocate the state of a batch, with a KV cache of B rows, or of 2B when guided.

        Args:
            z: (B, T, D), the latents, which are not mutated.
            condition: The labels and the guidance of the batch.
            reuse: A state of this backend that nobody needs any more, such as that of the block before. Its cache is
                taken over if it has the same size, since memory that the system hands out afresh is slow at its first
                use.

        Returns:
            A state whose x is a copy of z.

        Raises:
            ArgumentError: z does not have the shape (B, T, D) of this block.
        """
        ...

    def reverse(
        self, state: BlockState, progress: Progress | None = None, start: int = 1, stop: int | None = None
    ) -> None:
        """Run the sequential pass over the tokens [start, stop), 1 <= start <= stop <= T, by default all of them.

        The pass evaluates the transformer on the tokens [start−1, stop−1), one after the other, and writes their keys
        and values to the cache. The keys and values of the tokens before start−1 must be there already. It fills x and
        token_log_det of the tokens [start, stop).

        Args:
            state: The state of the batch, which is updated in place.
            progress: A function that is called with the number of tokens done since its last call.
            start: The first token to make.
            stop: The end of the tokens to make; None is T.

        Raises:
            ArgumentError: start and stop are out of range.
        """
        ...

    def fixed_point(self, state: BlockState, start: Bounds, stop: Bounds) -> Moved:
        """Run one parallel pass over the tokens [start, stop), 1 <= start < stop <= T, against the cached prefix.

        The pass evaluates the transformer on the tokens [start−1, stop−1) as they stand in state.x and writes their
        keys and values to the cache. The keys and values of the tokens before start−1 must be there already. It updates
        x and token_log_det of the tokens [start, stop) in place. `fixed_point(state, 1, T)` is one Jacobi pass; calls
        with stop = start + 1 for start = 1 … T−1 do what `reverse` does. The result of a token depends on the tokens
        before it and on nothing else, also where later tokens of the window are infinite or NaN.

        An engine that is `ragged` also takes B starts and B stops, a window for each sample. Column j of what it
        returns is then token start[b] + j of sample b, and 0 beyond that sample's window. A sample with start[b] =
        stop[b] takes no part.

        Args:
            state: The state of the batch, which is updated in place.
            start: The first token of the window, one for all samples or one for each.
            stop: The end of the window, one for all samples or one for each.

        Returns:
            How far the tokens of the window moved, with W columns, the width of the widest window.

        Raises:
            ArgumentError: start and stop are out of range, or differ between samples and the engine is not ragged.
        """
        ...

    def bytes_per_sample(self, guided: bool) -> int:
        """Returns an estimate of the bytes that `begin` and the passes allocate for each sample."""
        ...

    def served_by(self, batch: int, guided: bool) -> tuple[str, str] | None:
        """Returns the name of the backend that serves such a batch, and why, where it is one of several; else None."""
        ...


class Converged(NamedTuple):
    """The result of `FrontierEngine.iterate_on_device`.

    Attributes:
        passes: The number of passes, each of which depends on the one before.
        reached: The first token of each sample that is not final, or T if none is left.
        evaluations: The number of tokens that were evaluated, over all samples.
        residual: (B,), the largest residual of the tokens that were kept.
    """

    passes: int
    reached: list[int]
    evaluations: int
    residual: Tensor


class PassTrail(Protocol):
    """The rule by which a pass keeps a token's guess, and the record of what the pass found.

    `solvers/trail.py` makes it.

    Attributes:
        tol: How far a token may move and still be kept. With tol > 0, a token may also move as far as rounding of the
            residual stream may move it, see `stream`.
        stream: How far rounding of the residual stream may move a token, as a share of its largest value or of 1,
            whichever is larger.
        rounding: The same share for rounding of weights and cache. A movement smaller than that shows nothing.
        values: (4, B, T) fp32, what the passes showed of each token.
    """

    tol: float
    stream: float
    rounding: float
    values: Tensor


@runtime_checkable
class FrontierEngine(Protocol):
    """An engine that can also make many passes by itself, by the rule of `solvers/frontier.py`.

    The host then reads from the device once, at the end.
    """

    def max_window(self, state: BlockState) -> int:
        """Returns the most tokens of each sample that a pass of `iterate_on_device` can take."""
        ...

    def iterate_on_device(
        self,
        state: BlockState,
        guess: Tensor,
        reached: Sequence[int],
        trail: PassTrail,
        *,
        window: int,
        max_passes: int,
    ) -> Converged:
        """Run passes over the tokens [reached[b], reached[b] + window) of each sample b, without the host.

        The passes end when all tokens are final or `max_passes` were made.

        Args:
            state: The state of the batch, which is updated in place.
            guess: (B, T, D), finite values that replace a guess that overflows.
            reached: The first token of each sample that is not final, from 1 to T. The keys and values of the tokens
                before reached[b] − 1 must be in the cache.
            trail: The rule by which tokens are kept. What the passes find is added to its values.
            window: The most tokens of each sample in a pass, at most `max_window`.
            max_passes: The most passes to make.

        Returns:
            What the passes did, with the frontiers that they reached.

        Raises:
            ArgumentError: The window, guess or trail does not fit the state.
        """
        ...


def check_latents(z: Tensor, shape: BlockShape) -> None:
    """Raises ArgumentError unless z has the shape (B, T, D) of this block."""
    if z.dim() != 3 or tuple(z.shape[1:]) != (shape.tokens, shape.token_dim):
        raise ArgumentError("z", f"shape (B, {shape.tokens}, {shape.token_dim})", tuple(z.shape))


def check_plain(state: BlockState) -> None:
    """Raises ArgumentError unless z, x and token_log_det are contiguous float32 tensors, which native code needs."""
    for name in ("z", "x", "token_log_det"):
        tensor = getattr(state, name)
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ArgumentError(f"state.{name}", "a contiguous float32 tensor", f"{tensor.dtype}, {tensor.stride()}")


def embedding_rows(condition: Condition, batch: int, num_classes: int, device: torch.device) -> Tensor:
    """Returns the row of the embedding table for each cache row, (B,) int64, or (2B,) when guided.

    batch: B. num_classes: the number of classes; the table's row of this number stands for "no class".
    """
    if condition.labels is None:
        rows = torch.full((batch,), num_classes, dtype=torch.int64, device=device)
    else:
        rows = torch.where(condition.labels < 0, num_classes, condition.labels).to(device)
    if condition.guidance.active:
        rows = torch.cat([rows, torch.full_like(rows, num_classes)])
    return rows
