"""Masked autoregressive transforms by one Triton kernel, for float32 on NVIDIA GPUs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...masked import Affine, Shift, Spline, Univariate
from ...masked.sorting import SortedTransform


def masked_missing(transform: SortedTransform, dtype: torch.dtype) -> str | None:
    """Returns why the kernel cannot take this transform, or None if it can."""
    if dtype != torch.float32:
        return f"it has float32, and this flow is {dtype}"
    readers = [layer.source for layer in transform.layers]
    if len(set(readers)) < len(readers):
        return "it has one reader for each value, and this network has several"
    if len({layer.activation for layer in transform.layers if layer.activation.name != "identity"}) > 1:
        return "it has one activation, and this network has several"
    return None


class TritonMasked:
    """The inverse of a masked transform by one kernel.

    Args:
        transform: The transform, sorted, one for which `masked_missing` is None.
    """

    def __init__(self, transform: SortedTransform):
        self.transform = transform
        self._build()

    def _build(self) -> None:
        """Make the table of what the kernel does, and the tensors that it is about."""
        from ...kernels import masked_inverse as op

        t = self.transform
        device = t.layers[0].weight.device
        weights: list[Tensor] = []
        vectors: list[Tensor] = []
        adds: list[Tensor] = []
        counts = {"weights": 0, "vectors": 0, "adds": 0, "terms": 0, "rows": 0}

        def place(kind: str, where: list[Tensor], tensor: Tensor | None) -> int:
            if tensor is None:
                return -1
            where.append(tensor.detach().flatten())
            counts[kind] += tensor.numel()
            return counts[kind] - tensor.numel()

        def rows(count: int) -> int:
            counts["rows"] += count
            return counts["rows"] - count

        widths = [len(t.dims), *(len(layer.bias) for layer in t.layers)]
        read = [rows(layer.weight.shape[1]) for layer in t.layers]
        reader = {layer.source: i for i, layer in enumerate(t.layers)}
        raw = {layer.add: 0 for layer in t.layers if layer.add is not None}
        raw = {value: rows(widths[value]) for value in raw}
        norm = [[place("vectors", vectors, each) for each in (layer.scale, layer.shift)] for layer in t.layers]
        bias = [place("vectors", vectors, layer.bias) for layer in t.layers]
        add = [
            -1 if layer.add is None or layer.add_at is None else place("adds", adds, layer.add_at + raw[layer.add])
            for layer in t.layers
        ]
        self._terms: list[tuple[int, int]] = []
        for layer in t.layers:
            found = []
            for term in (layer.offset, layer.gate):
                found.append(counts["terms"] if term else -1)
                counts["terms"] += widths[len(self._terms) + 1] if term else 0
            self._terms.append((found[0], found[1]))

        def known(value: int, first: int) -> dict[str, int]:
            """The fields by which units of a value from `first` on become known."""
            fields = {"raw": raw[value] + first if value in raw else -1}
            if value in reader:
                i = reader[value]
                scale, shift = (at + first if at >= 0 else -1 for at in norm[i])
                active = int(t.layers[i].activation.name != "identity")
                fields |= {"read_to": read[i] + first, "scale": scale, "shift": shift, "active": active}
            return fields

        table: list[dict[str, int]] = []
        most = 0
        for step in range(t.steps):
            for i, layer in enumerate(t.layers):
                last = i == len(t.layers) - 1
                begin, stop, reach = layer.begin[step], layer.begin[step + 1], layer.reach[step]
                most = max(most, stop - begin if last else 0)
                for row in range(begin, stop, op.ROWS):
                    count = min(op.ROWS, stop - row)
                    block = layer.weight[row : row + count, :reach]
                    offset, gate = (at + row if at >= 0 else -1 for at in self._terms[i])
                    table.append(
                        {
                            "kind": op.PARAMETERS if last else op.UNITS,
                            "first": row - begin,
                            "count": count,
                            "inputs": reach,
                            "weight": place("weights", weights, block.t().contiguous()),
                            "read_from": read[i],
                            "bias": bias[i] + row,
                            "add": add[i] + row if add[i] >= 0 else -1,
                            "offset": offset,
                            "gate": gate,
                            **({} if last else known(i + 1, row)),
                        }
                    )
            moved = min(max(t.begin[step], t.passed), t.begin[step + 1])
            for kind, low, high in (
                (op.PASSED, t.begin[step], moved),
                (op.TRANSFORMED, moved, t.begin[step + 1]),
            ):
                if low < high:
                    table.append({"kind": kind, "first": low, "count": high - low, **known(0, low)})
        entries = [[entry.get(name, -1) for name in op.FIELDS] for entry in table]

        def joined(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
            return torch.cat([*parts, torch.zeros(1, device=device)]).to(device, dtype).contiguous()

        self._term_rows = counts["terms"]
        self._program = op.Program(
            table=torch.tensor(entries, dtype=torch.int32, device=device),
            weights=joined(weights, torch.float32),
            vectors=joined(vectors, torch.float32),
            adds=joined(adds, torch.int32),
            dims=len(t.dims),
            rows=counts["rows"],
            parameters=most,
            constants=self._constants(),
        )

    def _constants(self) -> dict[str, Any]:
        from ...kernels import masked_inverse as op

        active = [layer.activation for layer in self.transform.layers if layer.activation.name != "identity"]
        return {
            **_law(self.transform.univariate),
            "P": self.transform.univariate.parameters,
            "ACTIVATION": op.ACTIVATIONS.index(active[0].name) if active else 0,
            "ALPHA": float(active[0].alpha) if active else 0.0,
        }

    @torch.no_grad()
    def run(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns x, (B, D), and log|det dx/dz|, (B,), in nats.

        Args:
            z: (B, D) fp32.
            context: (B, C), or (1, C) for one that all samples share, or None.
        """
        from ...kernels import masked_inverse as op

        t = self.transform
        B, more = len(z), -len(z) % op.TILE
        terms = z.new_zeros(max(self._term_rows, 1), 1)
        if self._term_rows:
            found = [each for layer in t.layers for each in layer.of_context(context) if each is not None]
            columns = max(len(each) for each in found)
            joined = torch.cat([each.expand(columns, -1) for each in found], 1).t()
            terms = torch.nn.functional.pad(joined, (0, more if columns > 1 or B + more == 1 else 0)).contiguous()
        sorted_z = torch.nn.functional.pad(z[:, t.dims].t(), (0, more)).contiguous()
        x, log_det = op.masked_inverse(self._program, sorted_z, terms)
        return x[:, :B].t()[:, torch.argsort(t.dims)], log_det[:B].to(z.dtype)


def _law(univariate: Univariate) -> dict[str, Any]:
    """Returns the constants of a univariate transform."""
    from ...kernels import masked_inverse as op
    from ...kernels.spline import law_constants
    from ...spline import SplineLaw

    spline = univariate.law if isinstance(univariate, Spline) else SplineLaw(1, 0.0, 1.0)
    bins = 1 << (spline.bins - 1).bit_length()
    law = {**law_constants(spline), "BLOCK_BINS": bins, "FLOOR": 0.0, "SHIFT_FIRST": True}
    if isinstance(univariate, Affine):
        floor = abs(math.log(univariate.floor)) if univariate.law == "softclip" else univariate.floor
        law |= {"LAW": op.LAWS.index(univariate.law), "FLOOR": floor, "SHIFT_FIRST": univariate.shift_first}
    else:
        law["LAW"] = op.LAWS.index("shift" if isinstance(univariate, Shift) else "spline")
    return law
