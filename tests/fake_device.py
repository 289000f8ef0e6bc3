"""A fake device: backends whose engines misbehave on order, for tests of the probe.

They compute on the CPU what PyTorch's engine computes, but for the one thing that each does wrong. A process that
probes finds them by this module's name.
"""

from __future__ import annotations

import ctypes
import functools
import os
import time
from typing import Any

import torch

from tarflow_fast.backend.cpu.engine import CpuEngine
from tarflow_fast.backend.pytorch.engine import TorchEngine
from tarflow_fast.engine import BlockState, BlockWeights, Condition
from tarflow_fast.engine.backend import Backend, Maker, Request
from tarflow_fast.engine.shape import BlockShape

ROWS, LATE = 9, 128  # the row count and the token at which "wrong" engines are wrong
NAP = 3600.0
broken_here = False  # whether the engine of "breaks later" breaks the device of this process
_leaked: list[torch.Tensor] = []


class Faulty(TorchEngine):
    """PyTorch's engine with one fault, which its passes have."""

    fault = "none"
    calls = 0

    def begin(self, z: torch.Tensor, condition: Condition, reuse: BlockState | None = None) -> BlockState:
        state = super().begin(z, condition, reuse=reuse)
        if self.fault == "changes its input":
            z.add_(1)
        return state

    def reverse(self, state: BlockState, progress: Any = None, start: int = 1, stop: int | None = None) -> None:
        super().reverse(state, progress, start, stop)
        self._spoil(state, start, stop)

    def fixed_point(self, state: BlockState, start: Any, stop: Any) -> Any:
        before = state.x.clone() if self.fault == "looks ahead" else None
        moved = super().fixed_point(state, start, stop)
        if before is not None:
            state.x[:, 1] += 0 * before[:, -1]
        self._spoil(state, start if isinstance(start, int) else 1, stop if isinstance(stop, int) else None)
        return moved

    def _spoil(self, state: BlockState, start: int, stop: int | None) -> None:
        x, self.calls = state.x, self.calls + 1
        match self.fault:
            case "wrong rows" if len(x) == ROWS:
                x[-1, start] += 0.1
            case "wrong late" if x.shape[1] > LATE:
                x[:, max(start, LATE) : stop] += 0.1
            case "NaN leaks" if x.isnan().any():
                x[:, start:stop] += x[0, start:stop].sum() * 0
            case "writes beyond":
                ctypes.memset(x.data_ptr() + x.nbytes, 0, 4)
            case "other bits":
                x[:, start] += 1e-7 * self.calls
            case "uses old memory":
                x[:, start] += 0 * state.cache.keys_values[..., -1, :].sum()
            case "leaks":
                _leaked.append(torch.ones(2**20))
            case "hangs" | "answers late":
                time.sleep(NAP if self.fault == "hangs" else 8.0)
            case "crashes":
                os.abort()
            case "raises":
                raise ValueError("no such kernel")
            case "lacks memory":
                raise torch.OutOfMemoryError("out of memory")
            case "breaks later" if broken_here:
                raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")


def _nothing_missing(request: Request) -> None:
    return None


def _narrow_only(shape: BlockShape, dtype: torch.dtype) -> str | None:
    return "no heads of 64" if shape.head_dim == 64 else None


def _make(fault: str, request: Request, weights: BlockWeights) -> TorchEngine:
    engine = Faulty(weights, device=request.device, dtype=request.dtype)
    engine.fault = fault
    return engine


def _maker(fault: str, request: Request) -> Maker:
    if fault == "fails at import":
        raise ImportError("kernels.so: undefined symbol")
    return functools.partial(_make, fault, request)


def _quick(request: Request) -> Maker:
    return lambda weights: CpuEngine(weights, dtype=request.dtype)


def fake(fault: str = "none") -> Backend:
    """A backend that has this one fault."""
    return Backend(f"fake, {fault}", ("cpu",), _nothing_missing, functools.partial(_maker, fault), str, probed=True)


QUICK = Backend("quick", ("cpu",), _nothing_missing, _quick, str, probed=True)
NARROW = Backend("narrow", ("cpu",), _nothing_missing, _quick, str, unsupported=_narrow_only, probed=True)
