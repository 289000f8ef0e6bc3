"""The one contract that every backend meets: how a flow block is inverted, and the state it is inverted in.

Backends know nothing of solvers and solvers know nothing of backends: a solver is given a `BlockEngine` and a
`BlockState` and calls the two passes below. All tensors are in the block's own token order; whoever calls the engine
permutes. The parameters (xa, xb) that transform token i come from the tokens before it:

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
    """Classifier-free guidance: xa ← xa + g_i (xa − xa_u), and the same for xb (arXiv 2412.06329, section 3.5).

    scale: the weight w >= 0; 0 is no guidance. what: which of xa ("a") and xb ("b") it changes.
    attn_temp: > 0, divides the attention logits of the unguided branch u; without guidance there is no such branch.
    annealed: g_i = w·(i+1)/(T−1) for the parameters after token i, instead of g_i = w.
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
        return self.scale > 0

    def schedule(self, tokens: int) -> list[float]:
        """g_i for i = 0 … T−2."""
        if not self.annealed:
            return [float(self.scale)] * (tokens - 1)
        return [self.scale * (i + 1) / (tokens - 1) for i in range(tokens - 1)]


@dataclass(frozen=True)
class Condition:
    """What a batch is conditioned on. labels: (B,) int64, -1 for no class, or None (all rows without a class)."""

    labels: Tensor | None = None
    guidance: Guidance = field(default_factory=Guidance)


@dataclass
class BlockState:
    """One batch inside one flow block.

    z: (B, T, D) latents, never written. x: (B, T, D) tokens; x[:, 0] = z[:, 0], the rest is the engine's to fill (it
    starts as a copy of z). token_log_det: (B, T), Σ_d xa that made each token, in nats of dx/dz; 0 for token 0.
    cache: the engine's own (keys, values, scratch). cache_bytes: its size. nonfinite: what `first_nonfinite` gives, if
    the engine has seen it in passing. delegate: name and engine, where one of several was chosen (`autotune.py`).
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
        """log|det dx/dz|, (B,), in nats."""
        return self.token_log_det.sum(1)

    def first_nonfinite(self) -> Tensor:
        """The first token of each sample that has an infinity or NaN, T if none has; (B,) integers."""
        if self.nonfinite is not None:
            return self.nonfinite
        bad = ~host_ops.all_finite(self.x, 2)
        return torch.where(bad.any(1), bad.int().argmax(1), self.x.shape[1])


class Moved(NamedTuple):
    """What one parallel pass did to the tokens of its window; (B, W) each, NaN or infinite where a token is.

    change: max_d |new x − old x|. residual: max_d |forward(old x) − z| = max_d |new x − old x| · exp(−xa).
    """

    change: Tensor
    residual: Tensor


class BlockEngine(Protocol):
    """One flow block on one backend, its weights packed once at construction.

    dtype: of weights and KV cache. cached_bytes: memory held for batches to come, which would be given up for another
    batch. setup_seconds: spent so far on what is done once for a shape: compiling, choosing tiles, capturing graphs.
    ragged: whether `fixed_point` takes a window for each sample.
    """

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def setup_seconds(self) -> float: ...

    @property
    def ragged(self) -> bool: ...

    @property
    def cached_bytes(self) -> int: ...

    def empty_cache(self) -> None:
        """Free what `cached_bytes` counts."""
        ...

    def begin(self, z: Tensor, condition: Condition, reuse: BlockState | None = None) -> BlockState:
        """Allocate the state of a batch (cache rows: B, or 2B when guided). z: (B, T, D), not mutated.

        reuse: a state of this backend that nobody needs any more, as of the block before. Its cache is taken over if
        the size is the same: memory that the system hands out afresh is slow at its first use.
        """
        ...

    def reverse(
        self, state: BlockState, progress: Progress | None = None, start: int = 1, stop: int | None = None
    ) -> None:
        """The sequential pass over tokens [start, stop), 1 <= start <= stop <= T, by default all of them.

        Evaluates the transformer on one token after the other of [start−1, stop−1), writing their keys and values;
        those of tokens before start−1 must be in the cache. Fills x and token_log_det of tokens [start, stop).
        progress(n): n more tokens are done.
        """
        ...

    def fixed_point(self, state: BlockState, start: Bounds, stop: Bounds) -> Moved:
        """One parallel pass over tokens [start, stop), 1 <= start < stop <= T, against the cached prefix.

        Evaluates the transformer on tokens [start−1, stop−1) as they stand in state.x (writing their keys and
        values; those of tokens before start−1 must be in the cache), and updates x and token_log_det of tokens
        [start, stop) in place. `fixed_point(state, 1, T)` is one Jacobi pass; start = i, stop = i+1 for i = 1 … T−1 is
        `reverse`. A token's result depends on the tokens before it and on nothing else, also where later ones of the
        window are infinite or NaN.

        An engine that is `ragged` takes B starts and stops too, a window for each sample: column j of what it returns
        is then token start[b] + j of sample b, and 0 beyond that sample's window. Where start[b] = stop[b], sample b is
        left out.
        """
        ...

    def bytes_per_sample(self, guided: bool) -> int:
        """Memory that `begin` takes for each sample."""
        ...

    def served_by(self, batch: int, guided: bool) -> tuple[str, str] | None:
        """The name of the backend that serves such a batch, and why, where it is chosen among several; else None."""
        ...


class Converged(NamedTuple):
    """What `FrontierEngine.iterate_on_device` did.

    passes: dependent ones. reached: the first token of each sample that is not final. evaluations: tokens evaluated, of
    all samples. residual: (B,), the largest of the tokens that were kept.
    """

    passes: int
    reached: list[int]
    evaluations: int
    residual: Tensor


class PassTrail(Protocol):
    """When a pass keeps what was guessed for a token, and where it notes what it found: `solvers/trail.py` makes it.

    tol: how far a token may move and be kept; unless it is 0 at least the share `stream` of its largest value, or of 1,
    by which rounding of the residual stream may move it. rounding: that share for weights and cache; what moves by less
    shows nothing. values: (4, B, T) fp32, what passes showed.
    """

    tol: float
    stream: float
    rounding: float
    values: Tensor


@runtime_checkable
class FrontierEngine(Protocol):
    """An engine that also makes pass after pass by itself, by the rule of `solvers/frontier.py`, and the host reads the
    device once at the end."""

    def max_window(self, state: BlockState) -> int:
        """Tokens of a sample in a pass, at most."""
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
        """Passes over [reached[b], reached[b] + window) of each sample b, until all are done, or `max_passes` of them.

        guess: (B, T, D) finite, what a guess that overflows is replaced by. reached: 1 to T; keys and values of tokens
        before reached[b] − 1 must be in the cache. trail: says which tokens are kept; passes are added to it.
        """
        ...


def check_latents(z: Tensor, shape: BlockShape) -> None:
    """Raises ArgumentError unless z is (B, T, D)."""
    if z.dim() != 3 or tuple(z.shape[1:]) != (shape.tokens, shape.token_dim):
        raise ArgumentError("z", f"shape (B, {shape.tokens}, {shape.token_dim})", tuple(z.shape))


def check_plain(state: BlockState) -> None:
    """What native code reads and writes by its address. Raises ArgumentError."""
    for name in ("z", "x", "token_log_det"):
        tensor = getattr(state, name)
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ArgumentError(f"state.{name}", "a contiguous float32 tensor", f"{tensor.dtype}, {tensor.stride()}")


def embedding_rows(condition: Condition, batch: int, num_classes: int, device: torch.device) -> Tensor:
    """Row of the embedding table for each cache row, (B,) or (2B,) when guided: row num_classes is "no class"."""
    if condition.labels is None:
        rows = torch.full((batch,), num_classes, dtype=torch.int64, device=device)
    else:
        rows = torch.where(condition.labels < 0, num_classes, condition.labels).to(device)
    if condition.guidance.active:
        rows = torch.cat([rows, torch.full_like(rows, num_classes)])
    return rows
