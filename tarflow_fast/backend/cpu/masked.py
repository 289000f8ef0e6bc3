"""Masked autoregressive flows in C++ (`csrc/cpu/masked.*`): all transforms of a flow in one call, both ways.

A panel of samples goes through all dimensions of all transforms while its activations stay near. Threads divide the
panels. Results depend neither on the number of threads nor on what else is in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...devices import default_threads
from ...engine.contract import BlockState, Moved
from ...engine.masked import MaskedEngine
from ...masked import Linear, MaskedTransform, Permute, Reverse, Scale, Shift, Spline, Term, Univariate
from ...masked.flow import Step
from ...masked.layers import ACTIVATIONS
from ...masked.sorting import SortedLayer, SortedTransform, sort_transform
from ...native import address, choose_instruction_set, load_native
from ...spline import native_law

DTYPES = (torch.float32, torch.float64)
MOST_CONTEXT = 1 << 28  # bytes of what layers add by the context; larger batches go through in parts
_ACTIVATIONS = {name: i for i, name in enumerate(ACTIVATIONS)}
_AFFINE = {"softclip": 0, "softplus": 1, "sigmoid": 2, "exp": 3}
_SHIFT, _SPLINE = 4, 5


def takes(step: Step) -> bool:
    """Returns whether C++ has such a step."""
    return isinstance(step.step if isinstance(step, Reverse) else step, MaskedTransform | Permute | Scale | Linear)


def _law(univariate: Univariate) -> dict[str, Any]:
    """Returns the univariate transform by the names of native code, see `MaskedSource` in csrc/cpu/masked_flow.h."""
    law: dict[str, Any] = {"floor": 0.0, "shift_first": True, "spline": None, "parameters": univariate.parameters}
    if isinstance(univariate, Shift):
        return law | {"law": _SHIFT}
    if isinstance(univariate, Spline):
        return law | {"law": _SPLINE, "spline": native_law(univariate.law)}
    floor = abs(math.log(univariate.floor)) if univariate.law == "softclip" else univariate.floor
    return law | {"law": _AFFINE[univariate.law], "floor": floor, "shift_first": univariate.shift_first}


class _Packing:
    """The tensors whose addresses native code is given, which live as long as this does."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.kept: list[Tensor] = []

    def at(self, name: str, tensor: Tensor | None) -> int:
        """Returns the address of the tensor's values in this dtype, or 0 for None."""
        if tensor is None:
            return 0
        self.kept.append(tensor.detach().to("cpu", self.dtype).contiguous())
        return address(name, self.kept[-1], self.dtype)

    def layer(self, layer: SortedLayer) -> dict[str, Any]:
        """Returns a layer as native code takes it."""
        outputs, inputs = layer.weight.shape
        return {
            **{name: self.at(name, getattr(layer, name)) for name in ("weight", "bias", "scale", "shift")},
            "inputs": inputs,
            "outputs": outputs,
            "source": layer.source,
            "add": -1 if layer.add is None else layer.add,
            "begin": list(layer.begin),
            "reach": list(layer.reach),
            "add_at": [] if layer.add_at is None else layer.add_at.tolist(),
            "activation": _ACTIVATIONS[layer.activation.name],
            "alpha": float(layer.activation.alpha),
        }

    def transform(self, transform: SortedTransform) -> dict[str, Any]:
        """Returns a transform as native code takes it."""
        return {
            "dims": len(transform.dims),
            "passed": transform.passed,
            "begin": list(transform.begin),
            "layers": [self.layer(layer) for layer in transform.layers],
            **_law(transform.univariate),
        }


def pack(
    transforms: Sequence[SortedTransform],
    dtype: torch.dtype,
    instruction_set: str | None,
    matrices: Sequence[tuple[Tensor, Tensor]] = (),
) -> Any:
    """Returns transforms, and linear maps M x + b, with their weights packed, a `_cpu.MaskedFlow`.

    Args:
        transforms: The transforms.
        dtype: float32 or float64.
        instruction_set: One of `native.instruction_sets()`, by default the best.
        matrices: (D, D) and (D,) of each linear map, M and b.
    """
    packing = _Packing(dtype)
    squares = [
        {"weight": packing.at("weight", weight), "bias": packing.at("bias", bias), "size": len(bias)}
        for weight, bias in matrices
    ]
    return load_native().MaskedFlow(
        transforms=[packing.transform(each) for each in transforms],
        matrices=squares,
        f64=dtype == torch.float64,
        instruction_set=choose_instruction_set(instruction_set),
    )


class Terms:
    """What the context adds to the layers of a transform, and what it multiplies them by, as native code takes it.

    Args:
        transform: The transform.
        context: (B, C), or (1, C) for one that all samples share, or None.
        dtype: The dtype of the flow's weights.
        lanes: The number of samples of a panel.
    """

    def __init__(self, transform: SortedTransform, context: Tensor | None, dtype: torch.dtype, lanes: int):
        self.kept: list[Tensor] = []
        self.offset: list[tuple[int, int]] = []
        self.gate: list[tuple[int, int]] = []
        if context is not None and len(context) > 1:
            context = torch.nn.functional.pad(context, (0, 0, 0, -len(context) % lanes))
        for layer in transform.layers:
            for term, mine in ((layer.offset, self.offset), (layer.gate, self.gate)):
                mine.append((0, 0) if term is None else self._add(term, context, dtype))

    def _add(self, term: Term, context: Tensor | None, dtype: torch.dtype) -> tuple[int, int]:
        assert context is not None
        self.kept.append(term.by_units(context).detach().to("cpu", dtype))
        return address("context", self.kept[-1], dtype), len(context)


class CpuMaskedFlow:
    """Steps of a flow that C++ has, both ways.

    Args:
        steps: The steps, from data to latents, of which one at least is a masked transform; see `takes`.
        dtype: float32 or float64.
        threads: The number of threads, by default `default_threads()` at each call.
        instruction_set: One of `native.instruction_sets()`, by default the best.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        *,
        dtype: torch.dtype,
        threads: int | None = None,
        instruction_set: str | None = None,
    ):
        self.dtype, self.threads = dtype, threads
        self._sorted: list[SortedTransform] = []
        self._matrices: list[tuple[Tensor, Tensor]] = []
        self._steps: list[dict[str, Any]] = []
        self._packing = _Packing(dtype)
        self._constant = 0.0  # log|det dz/dx| of the scales and linear maps
        column: list[int] = []  # where in the batch each feature is, as permutations have left it
        for step in steps:
            if isinstance(step, MaskedTransform):
                column = column or list(range(step.features))
                self._add_transform(step, column)
                continue
            fixed, back = (step.step, True) if isinstance(step, Reverse) else (step, False)
            if isinstance(fixed, Permute):
                column = column or list(range(len(fixed.order)))
                order = _inverse(fixed.order) if back else fixed.order
                column = [column[i] for i in order]
            elif isinstance(fixed, Scale):
                column = column or list(range(len(fixed.scale)))
                self._add_scale(fixed, back, column)
            elif isinstance(fixed, Linear):
                column = column or list(range(len(fixed.weight)))
                self._add_linear(fixed, back, column)
        self.column = column
        self._native = pack(self._sorted, dtype, instruction_set, self._matrices)

    def _add_transform(self, step: MaskedTransform, column: list[int]) -> None:
        transform = sort_transform(step)
        self._steps.append(
            {
                "transform": len(self._sorted),
                "matrix": -1,
                "forward": not step.inverted,
                "row": [column[i] for i in transform.dims.tolist()],
                "scale": 0,
                "shift": 0,
            }
        )
        self._sorted.append(transform)

    def _add_scale(self, fixed: Scale, back: bool, column: list[int]) -> None:
        scale, shift = fixed.scale.detach().double().cpu(), fixed.shift.detach().double().cpu()
        if back:
            scale, shift = 1 / scale, -shift / scale
        places = torch.tensor(_inverse(column))
        scale, shift = scale[places], shift[places]
        ways = {True: (scale, shift), False: (1 / scale, -shift / scale)}
        plain = {
            way: {"matrix": -1}
            | {name: self._packing.at(name, each) for name, each in zip(("scale", "shift"), pair, strict=True)}
            for way, pair in ways.items()
        }
        self._constant += float(scale.abs().log().sum())
        self._steps.append({"transform": -1, "row": [], "forward": True, "ways": plain})

    def _add_linear(self, fixed: Linear, back: bool, column: list[int]) -> None:
        weight = fixed.weight.detach().double().cpu()
        bias = weight.new_zeros(len(weight)) if fixed.bias is None else fixed.bias.detach().double().cpu()
        inverse = torch.linalg.inv(weight)
        places = torch.tensor(_inverse(column))
        plain = {}
        for way, matrix, shift in ((not back, weight, bias), (back, inverse, -inverse @ bias)):
            plain[way] = {"matrix": len(self._matrices), "scale": 0, "shift": 0}
            self._matrices.append((matrix[places][:, places], shift[places]))
        log_det = float(torch.linalg.slogdet(weight).logabsdet)
        self._constant += -log_det if back else log_det
        self._steps.append({"transform": -1, "row": [], "forward": True, "ways": plain})

    @torch.no_grad()
    def run(self, values: Tensor, context: Tensor | None, *, to_latents: bool) -> tuple[Tensor, Tensor]:
        """Returns the latents of data, or the data of latents, (B, D), and log|det| of that map, (B,), in nats.

        Args:
            values: (B, D), of the flow's dtype, on the CPU.
            context: (B, C), or (1, C) for one that all samples share, or None.
            to_latents: The direction.
        """
        units = sum(len(layer.bias) for each in self._sorted for layer in each.layers if layer.offset or layer.gate)
        rows = len(values)
        if context is not None and len(context) > 1 and units:
            rows = max(self._native.lanes, MOST_CONTEXT // (units * self.dtype.itemsize))
        if rows >= len(values):
            return self._run(values, context, to_latents)
        parts = [
            self._run(part, some, to_latents)
            for part, some in zip(values.split(rows), context.split(rows), strict=True)  # type: ignore[union-attr]
        ]
        out, log_det = map(torch.cat, zip(*parts, strict=True))
        return out, log_det

    def _run(self, values: Tensor, context: Tensor | None, to_latents: bool) -> tuple[Tensor, Tensor]:
        moved = self.column != sorted(self.column)
        if moved and not to_latents:
            values = values[:, _inverse(self.column)]
        values = values.to(self.dtype).contiguous()
        terms = [Terms(each, context, self.dtype, self._native.lanes) for each in self._sorted]
        steps = [self._step(step, terms, to_latents) for step in self._steps]
        out, log_det = torch.empty_like(values), torch.empty(len(values), dtype=torch.float64)
        B, D = values.shape
        self._native.run(
            steps=steps if to_latents else steps[::-1],
            samples=B,
            values=address("values", values, self.dtype, count=B * D),
            out=address("out", out, self.dtype, count=B * D),
            log_det=address("log_det", log_det, torch.float64, count=B),
            threads=self.threads or default_threads(),
            progress=None,
        )
        log_det += self._constant if to_latents else -self._constant
        return out[:, self.column] if moved and to_latents else out, log_det.to(self.dtype)

    def _step(self, step: dict[str, Any], terms: list[Terms], to_latents: bool) -> dict[str, Any]:
        if step["transform"] < 0:
            return step | step["ways"][to_latents] | {"offset": [], "gate": []}
        mine = terms[step["transform"]]
        forward = step["forward"] == to_latents
        return step | {"forward": forward, "offset": mine.offset, "gate": mine.gate}


def _inverse(order: Sequence[int]) -> list[int]:
    """Returns the inverse of a permutation."""
    return sorted(range(len(order)), key=order.__getitem__)


class CpuMaskedEngine(MaskedEngine):
    """A `BlockEngine` of a masked transform in C++.

    Args:
        transform: The transform, sorted.
        threads: The number of threads, by default `default_threads()` at each call.
        instruction_set: One of `native.instruction_sets()`, by default the best.
    """

    def __init__(self, transform: SortedTransform, *, threads: int | None = None, instruction_set: str | None = None):
        super().__init__(transform, transform.layers[0].weight.dtype, torch.device("cpu"))
        self.threads = threads
        self._native = pack([transform], self.dtype, instruction_set)

    @torch.no_grad()
    def memory(self, batch: int, context: Tensor | None) -> tuple[tuple[Tensor, Terms], int]:
        """Returns the memory of a batch's units with what the context adds, and how many bytes that is."""
        panels = -(-batch // self._native.lanes)
        units = torch.empty(panels * self._native.memory_bytes, dtype=torch.uint8, device="cpu")
        return (units, Terms(self.transform, context, self.dtype, self._native.lanes)), units.nbytes

    def solve(self, state: BlockState, first: int, stop: int) -> None:
        """Make the dimensions [first, stop) known, one step after the other."""
        self._run(state, first, stop, None)

    def guess(self, state: BlockState, first: int, stop: int) -> Moved:
        """Make the dimensions [first, stop) from those of all steps before theirs as they stand."""
        moved = Moved(*(state.x.new_empty(len(state.x), stop - first) for _ in Moved._fields))
        self._run(state, first, stop, moved)
        return moved

    def _run(self, state: BlockState, first: int, stop: int, moved: Moved | None) -> None:
        units, terms = state.cache
        B, T, _ = state.x.shape

        def at(name: str, tensor: Tensor | None, columns: int) -> int:
            return 0 if tensor is None else address(name, tensor, self.dtype, count=B * columns)

        change, residual = (None, None) if moved is None else moved
        self._native.run_block(
            samples=B,
            first=first,
            stop=stop,
            z=at("state.z", state.z, T),
            x=at("state.x", state.x, T),
            log=at("state.token_log_det", state.token_log_det, T),
            change=at("change", change, stop - first),
            residual=at("residual", residual, stop - first),
            memory=address("cache", units, torch.uint8),
            offset=terms.offset,
            gate=terms.gate,
            threads=self.threads or default_threads(),
            progress=None,
        )
