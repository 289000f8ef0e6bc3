"""Both directions of a masked autoregressive flow, with the log-determinant in the same pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from ..backend.cpu.masked import DTYPES, CpuMaskedEngine, CpuMaskedFlow, takes
from ..backend.pytorch.masked import TorchMaskedEngine
from ..backend.triton import BACKEND
from ..backend.triton.masked import TritonMasked, masked_missing
from ..checks import check_choice, check_count, check_number
from ..engine.backend import Request
from ..engine.masked import ContextCondition, MaskedEngine, enter, leave
from ..errors import ArgumentError, BackendError
from ..limits import most_threads
from ..masked import Fixed, Linear, MaskedFlow, MaskedTransform, Reverse
from ..masked.flow import Step
from ..masked.sorting import sort_transform
from ..masked.stepping import invert
from ..native import load_native
from ..solvers import SOLVERS, Auto, CostTable, PassEstimate, Solver, adaptive, sequential

BACKENDS = ("auto", "cpu", "torch", "triton")
TOL = {torch.float32: 3e-6, torch.float64: 1e-12}  # the default, by dtype


class FlowInverse:
    """Both directions of a flow, by a snapshot of its weights.

    Args:
        flow: The flow; its weights are copied.
        backend: "cpu" is C++, for float32 and float64 on the CPU; "triton" is one kernel a transform, for float32 on
            NVIDIA GPUs; "torch" is PyTorch; "auto" is C++ where it serves, else PyTorch.
        solver: "sequential" goes through the dimensions in order, each unit evaluated once, and is exact. "adaptive"
            and "auto" make parallel passes, see `tarflow_fast/solvers/`; these may be quicker on a GPU.
        tol: How far a dimension may still move when a parallel pass takes it as final; None is the dtype's own.
        threads: The number of threads of "cpu", by default as many as torch's.

    Attributes:
        passes: How many passes each transform took when a solver last inverted it, in the order in which that was; with
            the sequential solver one for each dimension, or nothing where C++ or Triton goes through all of them.

    Raises:
        ArgumentError: An option is unknown or does not fit the others.
        BackendError: "cpu" was asked for and cannot serve.
    """

    def __init__(
        self,
        flow: MaskedFlow,
        *,
        backend: str = "auto",
        solver: str = "sequential",
        tol: float | None = None,
        threads: int | None = None,
    ):
        check_choice("backend", backend, BACKENDS)
        check_choice("solver", solver, SOLVERS)
        self.threads = None if threads is None else check_count("threads", threads, high=most_threads())
        if solver == "sequential" and tol is not None:
            raise ArgumentError("tol", "None with solver='sequential', which is exact; or another solver", tol)
        self.flow, self.solver = flow, solver
        weight = next(step for step in flow.steps if isinstance(step, MaskedTransform)).layers[0].weight
        self.dtype, self.device = weight.dtype, weight.device
        self.tol = TOL.get(self.dtype, 1e-3) if tol is None else check_number("tol", tol, 0)
        missing = self._native_missing()
        lacking = {"cpu": lambda: missing, "triton": self._triton_missing}.get(backend, lambda: None)()
        if lacking is not None:
            raise BackendError(f"backend {backend!r} cannot be had: {lacking}")
        self.backend = ("torch" if missing else "cpu") if backend == "auto" else backend
        self.passes: list[int] = []
        with torch.no_grad():
            self._pieces = self._make()

    def _native_missing(self) -> str | None:
        """Returns why C++ cannot serve, or None."""
        if self.device.type != "cpu" or self.dtype not in DTYPES:
            return f"it has float32 and float64 on the CPU, and this flow is {self.dtype} on {self.device}"
        try:
            load_native()
        except BackendError as error:
            return str(error)
        return None

    def _triton_missing(self) -> str | None:
        """Returns why Triton's kernel cannot serve, or None."""
        missing = BACKEND.missing(Request(self.device))
        if missing is None and self.solver != "sequential":
            missing = "it goes through the dimensions in order; leave solver out, or use backend='torch'"
        for step in self.flow.steps:
            if missing is None and isinstance(step, MaskedTransform):
                missing = masked_missing(sort_transform(step), self.dtype)
        return missing

    def _make(self) -> list[CpuMaskedFlow | _Solved | _Factored | Fixed]:
        """Returns what runs the steps, from data to latents: runs of them in C++, or one after the other."""
        if self.backend != "cpu" or self.solver != "sequential":
            return [
                self._solved(step) if isinstance(step, MaskedTransform) else _fixed(step) for step in self.flow.steps
            ]
        pieces: list[CpuMaskedFlow | _Solved | _Factored | Fixed] = []
        for native, run in groupby(self.flow.steps, takes):
            steps = list(run)
            if native and any(isinstance(step, MaskedTransform) for step in steps):
                pieces.append(CpuMaskedFlow(steps, dtype=self.dtype, threads=self.threads))
            else:
                pieces.extend(_fixed(step) for step in steps if not isinstance(step, MaskedTransform))
        return pieces

    def _solved(self, step: MaskedTransform) -> _Solved:
        transform = sort_transform(step)
        if self.backend == "triton":
            return _Solved(step, TritonMasked(transform).run)
        engine: MaskedEngine = (
            CpuMaskedEngine(transform, threads=self.threads) if self.backend == "cpu" else TorchMaskedEngine(transform)
        )
        solver: Solver = sequential
        if self.solver == "adaptive":
            solver = functools.partial(adaptive, tol=self.tol, dtype=self.dtype)
        elif self.solver == "auto":
            solver = Auto(self.tol, PassEstimate(engine.tokens, {}, {}), CostTable(), None, self.dtype)
        return _Solved(step, functools.partial(self._by_engine, engine, solver))

    def _by_engine(
        self, engine: MaskedEngine, solver: Solver, values: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns the inverse of a transform at these values, (B, D), and its log|det|, (B,)."""
        state = engine.begin(enter(engine.transform, values), ContextCondition(context=context))
        self.passes.append(solver(engine, state).passes)
        return leave(engine.transform, state.x), state.log_det

    @torch.no_grad()
    def to_data(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the data of latents, (B, D), and log|det dx/dz|, (B,), in nats.

        Args:
            z: (B, D).
            context: (B, C), or (1, C) for one that all samples share, or None.
        """
        return self._run(z, context, to_latents=False)

    @torch.no_grad()
    def to_latents(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the latents of data, (B, D), and log|det dz/dx|, (B,), in nats.

        Args:
            x: (B, D).
            context: (B, C), or (1, C) for one that all samples share, or None.
        """
        return self._run(x, context, to_latents=True)

    def _run(self, values: Tensor, context: Tensor | None, *, to_latents: bool) -> tuple[Tensor, Tensor]:
        values = values.detach().to(self.device, self.dtype)
        context = None if context is None else context.detach().to(self.device, self.dtype)
        total = values.new_zeros(len(values))
        self.passes.clear()
        for piece in self._pieces if to_latents else reversed(self._pieces):
            if isinstance(piece, CpuMaskedFlow | _Solved | _Factored):
                values, log_det = piece.run(values, context, to_latents=to_latents)
            else:
                values, log_det = piece.forward(values) if to_latents else piece.inverse(values)
            total = total + log_det
        return values, total


class _Solved:
    """A masked transform whose slow direction is a function of latents and context."""

    def __init__(self, step: MaskedTransform, solve: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]):
        self.step, self.solve = step, solve

    def run(self, values: Tensor, context: Tensor | None, *, to_latents: bool) -> tuple[Tensor, Tensor]:
        """Returns the image of values, (B, D), and log|det| of the map, (B,)."""
        return (self.step.forward if to_latents != self.step.inverted else self.solve)(values, context)


class _Factored:
    """A linear map whose LU factors and determinant are computed once."""

    def __init__(self, step: Linear, *, inverted: bool):
        self.step, self.inverted = step, inverted
        self.factors = torch.linalg.lu_factor(step.weight)
        self.log_det = torch.linalg.slogdet(step.weight).logabsdet

    def run(self, values: Tensor, context: Tensor | None, *, to_latents: bool) -> tuple[Tensor, Tensor]:
        """Returns the image of values, (B, D), and log|det| of the map, (B,). context: none counts."""
        bias, rows = self.step.bias, values.shape[:1]
        if to_latents != self.inverted:
            return torch.nn.functional.linear(values, self.step.weight, bias), self.log_det.expand(rows)
        centred = values if bias is None else values - bias
        return torch.linalg.lu_solve(*self.factors, centred.T).T, -self.log_det.expand(rows)


def _fixed(step: Fixed) -> _Factored | Fixed:
    """Returns what runs a step that no network conditions."""
    if isinstance(step, Linear):
        return _Factored(step, inverted=False)
    if isinstance(step, Reverse) and isinstance(step.step, Linear):
        return _Factored(step.step, inverted=True)
    return step


def differentiable(
    steps: Sequence[Step], values: Tensor, context: Tensor | None, *, to_latents: bool
) -> tuple[Tensor, Tensor]:
    """Returns the image of values, (B, D), and log|det| of the map, (B,), which autograd records.

    Args:
        steps: The steps of a flow, from data to latents, with the tensors that are to have gradients.
        values: (B, D), data or latents.
        context: (B, C), or (1, C) for one that all samples share, or None.
        to_latents: The direction.
    """
    total = values.new_zeros(len(values))
    for step in steps if to_latents else reversed(steps):
        if not isinstance(step, MaskedTransform):
            values, log_det = step.forward(values) if to_latents else step.inverse(values)
        elif to_latents != step.inverted:
            values, log_det = step.forward(values, context)
        else:
            values, log_det = invert(sort_transform(step), values, context)
        total = total + log_det
    return values, total
