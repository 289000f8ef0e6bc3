"""The memory that the Triton engine works in, at addresses that stay: a CUDA graph replays launches with pointers.

A workspace belongs to one state at a time. The engines of a model share a `Pool`, from which each block's state takes
the workspace of the block before, and the next batch that of the batch before.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from ...devices import free_memory
from ...engine.contract import BlockState
from ...engine.shape import BlockShape
from ...errors import OutOfMemoryError
from ...kernels import cached_attention, norm_linear
from ...kernels.launch import Scratch
from .plan import Plan

KEPT = 2  # workspaces that a pool keeps for batches to come


@dataclass(frozen=True)
class Size:
    """Of a workspace: B samples, each a row of the cache, or two when guided."""

    shape: BlockShape
    dtype: torch.dtype
    device: torch.device
    batch: int
    branches: int

    @property
    def rows(self) -> int:
        return self.batch * self.branches

    @property
    def cache_bytes(self) -> int:
        shape = self.shape
        return 2 * shape.layers * self.rows * shape.tokens * shape.channels * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """All of it for windows of one token, without the scratch memory that rows share."""
        shape, stream = self.shape, 4
        step = self.rows * (10 * shape.channels + 2 * shape.token_dim) * stream
        return self.cache_bytes + step + 2 * self.batch * shape.tokens * (shape.token_dim + 1) * stream


def widened(start: int, stop: int, tokens: int) -> tuple[int, int]:
    """A window around [start, stop) of one of few widths: the powers of two below T − 1, and T − 1 itself.

    Each width has kernels, buffers and graphs of its own, and a solver's windows have any. It is widened to the left as
    far as there are tokens, and then to the right.
    """
    width = min(triton.next_power_of_2(stop - start), tokens - 1)
    first = max(1, stop - width)
    return first, first + width


class Window:
    """Activations of a pass over so many tokens of each row, its tiles, and the graphs that were captured with them."""

    def __init__(self, size: Size, window: int, plan: Plan, out_dim: int):
        shape, device = size.shape, size.device
        rows, C = size.rows * window, shape.channels

        def empty(width: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(rows, width, dtype=dtype, device=device)

        self.plan = plan
        self.h = empty(C)  # the residual stream
        self.queries, self.attended = empty(C, size.dtype), empty(C, size.dtype)
        self.hidden = empty(shape.hidden, size.dtype)
        self.parameters = empty(out_dim)
        self.change, self.residual = (
            torch.empty(size.batch, window, dtype=torch.float32, device=device) for _ in range(2)
        )
        self.scratch = self._scratch(size, window, plan, out_dim)
        self.graphs: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()

    @staticmethod
    def _scratch(size: Size, window: int, plan: Plan, out_dim: int) -> Scratch:
        C, rows = size.shape.channels, size.rows * window
        widths = {"qkv": 3 * C, "proj": C, "fc1": size.shape.hidden, "fc2": C, "proj_out": out_dim}
        linear: dict[str, norm_linear.Tile] = {name: getattr(plan, name) for name in widths}
        needs = [tile.scratch(rows, widths[name]) for name, tile in linear.items()]
        attention: cached_attention.Tile = plan.attention
        needs.append(attention.scratch(size.rows, size.shape.heads, window, size.shape.head_dim))
        return Scratch.allocate(max(n for n, _ in needs), max(n for _, n in needs), size.device)


@dataclass(eq=False)
class Workspace:
    """Of one batch: its tokens, what it is conditioned on, its KV cache, and activations for each size of window."""

    size: Size
    z: Tensor = field(init=False)
    x: Tensor = field(init=False)
    token_log_det: Tensor = field(init=False)
    nonfinite: Tensor = field(init=False)
    position: Tensor = field(init=False)
    guidance: Tensor = field(init=False)
    scale: Tensor = field(init=False)  # (R,), of the logits
    classes: Tensor | None = field(init=False)
    keys_values: Tensor = field(init=False)  # (L, 2, R, H, T, d)
    windows: dict[int, Window] = field(default_factory=dict)  # by tokens
    owner: Callable[[], BlockState | None] = lambda: None
    used: Any = None  # a CUDA event after the last kernel that touched it

    def __post_init__(self) -> None:
        size, shape = self.size, self.size.shape
        B, T, D, R = size.batch, shape.tokens, shape.token_dim, size.rows

        def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(sizes, dtype=dtype, device=size.device)

        self.keys_values = empty(shape.layers, 2, R, shape.heads, T, shape.head_dim, dtype=size.dtype)
        self.z, self.x, self.token_log_det = empty(B, T, D), empty(B, T, D), empty(B, T)
        self.nonfinite = empty(B, dtype=torch.int32)
        # a stale one may be prefetched from, but none that never was
        self.position = torch.zeros(1, dtype=torch.int32, device=size.device)
        self.guidance, self.scale = empty(max(T - 1, 0)), empty(R)
        self.classes = empty(R, shape.channels) if shape.classes else None

    @property
    def idle(self) -> bool:
        return self.owner() is None

    def window(self, tokens: int, make: Callable[[], Window]) -> Window:
        """Buffers for windows of so many tokens, see `widened`."""
        if tokens not in self.windows:
            with torch.inference_mode(False):  # see Pool.take
                self.windows[tokens] = make()
        return self.windows[tokens]


class Pool:
    """Workspaces of a model's engines."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Size, Workspace] = OrderedDict()

    @property
    def cached_bytes(self) -> int:
        """Memory that is held for batches to come, and would be given up for another batch."""
        return sum(size.bytes for size, workspace in self._kept.items() if workspace.idle)

    def empty_cache(self) -> None:
        self._kept = OrderedDict((size, workspace) for size, workspace in self._kept.items() if not workspace.idle)

    def take(self, size: Size, reuse: BlockState | None) -> Workspace:
        """A workspace of this size that nobody uses, or nobody will. Raises OutOfMemoryError."""
        workspace = reuse.cache if reuse is not None else None
        if isinstance(workspace, Workspace) and workspace.size == size and workspace.owner() is reuse:
            return workspace
        kept = self._kept.get(size)
        if kept is not None and kept.idle:
            self._kept.move_to_end(size)
            return kept
        self._make_room(size)
        with torch.inference_mode(False):  # tensors made in that mode could never be written outside of it
            workspace = self._kept[size] = Workspace(size)
        return workspace

    def _make_room(self, size: Size) -> None:
        for other in list(self._kept):
            if self._kept[other].idle and (len(self._kept) >= KEPT or size.bytes > free_memory(size.device)):
                del self._kept[other]
        free = free_memory(size.device)
        if size.bytes > free and size.device.type != "meta":
            each = -(-size.bytes // size.batch)
            raise OutOfMemoryError(
                f"z: {size.batch} samples need {size.bytes / 2**20:.0f} MiB on {size.device}, {free // each} would fit"
            )
