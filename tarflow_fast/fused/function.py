"""What fused operations share: which code serves a tensor, and how autograd knows them."""

from __future__ import annotations

import functools
import os
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..devices import triton_missing
from ..errors import BackendError
from ..native import ISA_VARIABLE, choose_instruction_set, load_native

Way = Literal["torch", "cpu", "triton"]
DTYPES = (torch.float32, torch.float64)
GRAIN = 32768
"""The number of values from which on torch divides an operation among threads (at::internal::GRAIN_SIZE): with fewer,
the call takes longer than the values do.
"""
MANY_PASSES = 24
"""So many of PyTorch's calls take longer than one of native code, which Python has to prepare, whatever the values."""


class Op(Protocol):
    """An operation (parameters, value) -> (image, log-determinant), which holds all its settings."""

    @property
    def passes(self) -> int:
        """How many passes over memory, of a call each, PyTorch takes for it."""

    def plain(self, parameters: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the image and the log-determinant by PyTorch's operations, which autograd records."""

    def run(self, way: Way, parameters: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Returns them by the code of `way`, which is not "torch". Both tensors are contiguous."""

    def back(
        self, way: Way, d_image: Tensor, d_log_det: Tensor, parameters: Tensor, value: Tensor, image: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the gradients of the parameters and of the value, from those of the results. All are contiguous."""


def apply(op: Op, parameters: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the image and the log-determinant of an operation, by the code that serves these tensors.

    Gradients of the first order come from one fused pass too, and further ones through PyTorch's operations.
    """
    way = serving(op, parameters, value)
    if way == "torch":
        return op.plain(parameters, value)
    parameters, value = parameters.contiguous(), value.contiguous()
    if torch.is_grad_enabled() and (parameters.requires_grad or value.requires_grad):
        image, log_det = Fused.apply(op, way, parameters, value)
        return image, log_det
    return op.run(way, parameters, value)


def serving(op: Op, parameters: Tensor, value: Tensor) -> Way:
    """Returns which code serves: "cpu", "triton" or, where neither can, "torch".

    Both fused codes take float32 and float64. PyTorch serves where it traces or transforms functions, in forward-mode
    differentiation, where a code was not built or does not agree with it, and on CPUs where its own calls take less.
    """
    count, dtype, kind = value.numel(), value.dtype, value.device.type
    if kind == "cpu" and count < GRAIN and op.passes < MANY_PASSES:
        return "torch"
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    if torch.compiler.is_compiling() or wrapped(value) or wrapped(parameters) or forward_ad._current_level >= 0:
        return "torch"
    if count == 0 or dtype not in DTYPES or parameters.dtype != dtype:
        return "torch"
    if kind == "cpu" and native_there():
        return "cpu"
    if kind == "cuda" and _triton_agrees(type(op), value.device, dtype):
        return "triton"
    return "torch"


class Fused(torch.autograd.Function):
    """An operation as autograd knows it."""

    @staticmethod
    def forward(ctx: Any, op: Op, way: Way, parameters: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        image, log_det = op.run(way, parameters, value)
        ctx.op, ctx.way = op, way
        ctx.save_for_backward(parameters, value, image)
        return image, log_det

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor | None, Tensor | None]:
        parameters, value, image = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated
            needed = [x for x, need in zip((parameters, value), ctx.needs_input_grad[2:], strict=True) if need]
            results = zip(ctx.op.plain(parameters, value), gradients, strict=True)
            outputs, seeds = zip(*((x, seed) for x, seed in results if x.requires_grad), strict=True)
            found = iter(torch.autograd.grad(outputs, needed, seeds, create_graph=True, allow_unused=True))
            of_parameters, of_value = (next(found) if need else None for need in ctx.needs_input_grad[2:])
            return None, None, of_parameters, of_value
        gradients = tuple(gradient.contiguous() for gradient in gradients)
        return None, None, *ctx.op.back(ctx.way, *gradients, parameters, value, image)


@functools.cache
def native_there() -> bool:
    """Returns whether the compiled module of the CPU is there."""
    try:
        return bool(load_native())
    except BackendError:
        return False


def native_settings(value: Tensor) -> dict[str, Any]:
    """Returns the arguments that all native operations have: the dtype, the instruction set and torch's threads."""
    return {
        "wide": value.dtype == torch.float64,
        "instruction_set": _instruction_set(os.environ.get(ISA_VARIABLE)),
        "threads": torch.get_num_threads(),
    }


@functools.cache
def _instruction_set(wanted: str | None) -> str:
    return choose_instruction_set(wanted)


@functools.cache
def _triton_agrees(kind: type[Any], device: torch.device, dtype: torch.dtype) -> bool:
    """Returns whether Triton's kernels of this kind of operation give PyTorch's results and gradients on this device.

    kind: a class with a method `example`, which returns an operation of either direction and inputs for it.
    """
    if triton_missing() is not None:
        return False
    allowed = 1e-4 if dtype == torch.float32 else 1e-9
    for inverse in (False, True):
        op, *inputs = kind.example(device, dtype, inverse)
        found = []
        try:
            with torch.enable_grad():
                for way in ("triton", "torch"):
                    given = [x.clone().requires_grad_() for x in inputs]
                    results = op.plain(*given) if way == "torch" else Fused.apply(op, way, *given)
                    seeds = [torch.linspace(-1, 1, x.numel(), device=device, dtype=dtype).view_as(x) for x in results]
                    found.append([*results, *torch.autograd.grad(results, given, seeds)])
        except Exception:  # whatever a compiler or a driver raises, PyTorch serves
            return False
        if not all(torch.allclose(a, b, rtol=allowed, atol=allowed) for a, b in zip(*found, strict=True)):
            return False
    return True
