"""The inverse of a masked transform in PyTorch, step by step, each unit evaluated once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .sorting import SortedTransform


class Growing:
    """Units that become known from the first to the last, kept in pieces, so that autograd can go back through them."""

    def __init__(self) -> None:
        self.pieces: list[Tensor] = []

    def put(self, start: int, values: Tensor) -> None:
        """Add units after those that there are. start: their number. values: (B, n)."""
        self.pieces.append(values)

    def prefix(self, count: int) -> Tensor:
        """Returns the first `count` units, (B, count), which are all that there are."""
        if len(self.pieces) > 1:
            self.pieces = [torch.cat(self.pieces, -1)]
        return self.pieces[0][:, :count]


class Buffer:
    """Units in one piece of memory, (B, n), which may be written again."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def put(self, start: int, values: Tensor) -> None:
        """Write the units [start, start + n). values: (B, n)."""
        self.values[:, start : start + values.shape[-1]] = values

    def prefix(self, count: int) -> Tensor:
        """Returns the first `count` units, (B, count), a view."""
        return self.values[:, :count]


class Memory:
    """What is known of the units of a batch: for each layer what it reads, and those values that some layer adds.

    Args:
        transform: The transform.
        context: What offset and gate of each layer are, see `SortedLayer.of_context`.
        rows: B.
        like: A tensor of the dtype and device of memory that may be written again; by default memory grows, and
            autograd records it.
    """

    def __init__(
        self,
        transform: SortedTransform,
        context: Sequence[tuple[Tensor | None, Tensor | None]],
        rows: int,
        like: Tensor | None = None,
    ):
        def units(count: int) -> Growing | Buffer:
            return Growing() if like is None else Buffer(like.new_empty(rows, count))

        self.context, self.rows = context, rows
        layers = transform.layers
        self.read = [units(layer.weight.shape[1]) for layer in layers]
        added = {layer.add for layer in layers if layer.add is not None}
        widths = [len(transform.dims), *(layer.weight.shape[0] for layer in layers)]
        self.raw = {value: units(widths[value]) for value in added}
        self.readers = [[i for i, layer in enumerate(layers) if layer.source == v] for v in range(len(layers) + 1)]
        self.layers = layers

    @property
    def bytes(self) -> int:
        """Returns the bytes of memory that may be written again."""
        return sum(each.values.nbytes for each in (*self.read, *self.raw.values()) if isinstance(each, Buffer))

    def put(self, value: int, start: int, h: Tensor) -> None:
        """Make units of a value known. value: its number. start: the first of them. h: (B, n)."""
        for reader in self.readers[value]:
            self.read[reader].put(start, self.layers[reader].read(h, start))
        if value in self.raw:
            self.raw[value].put(start, h)

    def evaluate(self, first: int, stop: int) -> Tensor:
        """Evaluate the units of the steps [first, stop), each from all that it reads as it stands.

        Returns:
            (B, n), the units of the last layer, which are the parameters of the dimensions of these steps that are
            transformed.
        """
        h = self.layers[-1].bias.new_empty(self.rows, 0)
        for i, layer in enumerate(self.layers):
            a, b, reach = layer.begin[first], layer.begin[stop], layer.reach[stop - 1]
            if a == b:
                h = h[:, :0]
                continue
            if reach:
                h = F.linear(self.read[i].prefix(reach), layer.weight[a:b, :reach], layer.bias[a:b])
            else:
                h = layer.bias[a:b].expand(self.rows, -1)
            offset, gate = self.context[i]
            if offset is not None:
                h = h + offset[:, a:b]
            if gate is not None:
                h = h * gate[:, a:b]
            if layer.add is not None and layer.add_at is not None:
                at = layer.add_at[a:b]
                h = h + self.raw[layer.add].prefix(int(at.max()) + 1)[:, at]
            self.put(i + 1, a, h)
        return h


def context_rows(transform: SortedTransform, context: Tensor | None) -> list[tuple[Tensor | None, Tensor | None]]:
    """Returns offset and gate of each layer for a context, (B, C) or (1, C), or None."""
    return [layer.of_context(context) for layer in transform.layers]


def invert(transform: SortedTransform, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns x with f(x) = z, (B, D), and log|det dx/dz|, (B,), which autograd records.

    Args:
        transform: The transform, sorted.
        z: (B, D).
        context: (B, C) or (1, C), or None.
    """
    P = transform.univariate.parameters
    memory = Memory(transform, context_rows(transform, context), len(z))
    z = z[:, transform.dims]
    log_det = z.new_zeros(len(z))
    x = []
    for step in range(transform.steps):
        start, stop = transform.begin[step], transform.begin[step + 1]
        moved = max(start, transform.passed)
        if start < moved:
            x.append(z[:, start:moved])
            memory.put(0, start, x[-1])
        # Units that depend on no dimension are of step 0, even where all its dimensions pass unchanged.
        parameters = memory.evaluate(step, step + 1)
        if moved < stop:
            values, slopes = transform.univariate.inverse(z[:, moved:stop], parameters.unflatten(-1, (stop - moved, P)))
            log_det = log_det + slopes.sum(-1)
            x.append(values)
            memory.put(0, moved, values)
    return torch.cat(x, -1)[:, torch.argsort(transform.dims)], log_det
