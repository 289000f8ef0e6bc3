"""A masked transform in the order of its inverse: dimensions and units sorted by the step in which they become known.

What a step reads is then a prefix of what is known, so that each weight is used once and masked zeros are not
multiplied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .layers import Activation, Layer
from .transform import MaskedTransform
from .univariate import Univariate


@dataclass(frozen=True)
class SortedLayer:
    """A layer whose units are sorted by the step in which they can be evaluated; those that nobody needs are left out.

    Attributes:
        weight: (O, I), rows in the order of this layer's units, columns in the order of what is read.
        bias: (O,), 0 where the layer has none.
        begin: S + 1 numbers; the units [begin[s], begin[s+1]) are those of step s.
        reach: S numbers; the units of step s read the first reach[s] of the units of the value that they read.
        source: The number of the value that is read; 0 is x, l is the result of layer l.
        activation: The activation of what is read.
        scale: (I,) or None, see `Layer`.
        shift: (I,) or None.
        add: The number of the value that is added, or None.
        add_at: (O,) int64, which of that value's units is added to each unit, or None.
        rows: (O,) int64, the unit's number in the layer as it was described.
        offset: See `Layer`; its results are in the layer's own order.
        gate: See `Layer`; likewise.
    """

    weight: Tensor
    bias: Tensor
    begin: tuple[int, ...]
    reach: tuple[int, ...]
    source: int
    activation: Activation
    scale: Tensor | None
    shift: Tensor | None
    add: int | None
    add_at: Tensor | None
    rows: Tensor
    offset: Callable[[Tensor], Tensor] | None
    gate: Callable[[Tensor], Tensor] | None

    def read(self, v: Tensor, start: int) -> Tensor:
        """Returns act(scale · v + shift), (…, n). v: (…, n), the units [start, start + n) of the value that is read."""
        part = slice(start, start + v.shape[-1])
        if self.scale is not None:
            v = v * self.scale[part]
        if self.shift is not None:
            v = v + self.shift[part]
        return self.activation(v)

    def of_context(self, context: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Returns what offset and gate are for this context, each (…, O) in the sorted order, or None."""
        offset, gate = (None if f is None else f(context)[..., self.rows] for f in (self.offset, self.gate))  # type: ignore[arg-type]
        return offset, gate


@dataclass(frozen=True)
class SortedTransform:
    """A masked transform in the order of its inverse.

    Attributes:
        steps: S, the number of steps.
        dims: (D,) int64, the dimensions in the order in which they become known; first those that pass unchanged.
        begin: S + 1 numbers; the dimensions dims[begin[s]:begin[s+1]] become known in step s.
        passed: The number of dimensions that pass unchanged.
        layers: The layers. The last one has P units for each transformed dimension, in the order of `dims`.
        univariate: The univariate transform, of P parameters.
    """

    steps: int
    dims: Tensor
    begin: tuple[int, ...]
    passed: int
    layers: tuple[SortedLayer, ...]
    univariate: Univariate

    def step_of(self, dim: int) -> int:
        """Returns the step in which the dimension with this place in `dims` becomes known."""
        return next(s for s, (_, stop) in enumerate(pairwise(self.begin)) if dim < stop)


def _offsets(steps: Tensor, count: int) -> tuple[int, ...]:
    """Returns for s = 0 … count how many of the sorted steps are smaller than s."""
    return tuple(int(n) for n in torch.searchsorted(steps, torch.arange(count + 1)))


def sort_transform(transform: MaskedTransform) -> SortedTransform:
    """Returns the transform in the order of its inverse; autograd records how its weights are reordered."""
    order, P = transform.order, transform.univariate.parameters
    S, D = order.steps, transform.features
    device = transform.layers[0].weight.device
    moved = torch.zeros(D, dtype=torch.bool)
    moved[list(transform.dims)] = True
    dims = torch.argsort(order.dims * 2 + moved, stable=True)  # dimensions that pass unchanged are of step 0
    # The last layer's units are needed in the step of their dimension, whenever they could be evaluated.
    place = torch.full((D,), -1)
    place[list(transform.dims)] = torch.arange(len(transform.dims))
    last = (place[dims[place[dims] >= 0]][:, None] * P + torch.arange(P)).flatten()
    units = [*order.units, order.dims[list(transform.dims)].repeat_interleave(P)]
    ready = [order.dims + 1, *units]  # for each value, from which step on its units may be read
    rows = [dims, *(torch.argsort(steps, stable=True) for steps in units[:-1]), last]
    rows = [kept if v == 0 else kept[ready[v][kept] < S] for v, kept in enumerate(rows)]
    layers = []
    for number, layer in enumerate(transform.layers, 1):
        mine, theirs = rows[number], rows[layer.source]
        reach = _offsets(ready[layer.source][theirs], S)[1:]
        layers.append(_sorted_layer(layer, mine, theirs, rows, ready[number], reach, S, device))
    return SortedTransform(
        steps=S,
        dims=dims.to(device),
        begin=_offsets(order.dims[dims], S),
        passed=D - len(transform.dims),
        layers=tuple(layers),
        univariate=transform.univariate,
    )


def _sorted_layer(
    layer: Layer,
    mine: Tensor,
    theirs: Tensor,
    rows: list[Tensor],
    ready: Tensor,
    reach: tuple[int, ...],
    steps: int,
    device: torch.device,
) -> SortedLayer:
    """Returns a layer with the units `mine`, and what it reads, `theirs`, by their numbers as they were described."""
    add_at = None
    if layer.add is not None:
        place = torch.full((layer.outputs,), -1)
        place[rows[layer.add]] = torch.arange(len(rows[layer.add]))
        add_at = place[mine].to(device)
    here, there = mine.to(device), theirs.to(device)
    bias = layer.weight.new_zeros(layer.outputs) if layer.bias is None else layer.bias
    return SortedLayer(
        weight=layer.weight[here][:, there],
        bias=bias[here],
        begin=_offsets(ready[mine], steps),
        reach=reach,
        source=layer.source,
        activation=layer.activation,
        scale=None if layer.scale is None else layer.scale[there],
        shift=None if layer.shift is None else layer.shift[there],
        add=layer.add,
        add_at=add_at,
        rows=here,
        offset=layer.offset,
        gate=layer.gate,
    )
