"""Backends for tests of the probe, which processes of their own find by this module's name.

Those of `fake_device.py` misbehave on order. Here are real ones on the CPU: the Triton engine in Triton's interpreter
and the CUDA engine in its emulation, both as backends that have to be probed.
"""

from __future__ import annotations

import os
from dataclasses import replace

from tarflow_fast.backend import triton
from tarflow_fast.backend.cuda import engine as cuda_engine
from tarflow_fast.engine.backend import Backend, Maker, Request


def _emulated_maker(request: Request) -> Maker:
    from cuda_emulation import emulated

    cuda_engine.load_native = emulated  # as conftest.py has it in the processes of the tests
    return lambda weights: cuda_engine.CudaEngine(weights, device=request.device, dtype=request.dtype)


def _nothing_missing(request: Request) -> None:
    return None


def _interpreted_missing(request: Request) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    from interpreter import patch_once

    patch_once()


EMULATED = Backend("emulated", ("cpu",), _nothing_missing, _emulated_maker, str, probed=True)
INTERPRETED = replace(triton.BACKEND, name="interpreted", devices=("cpu",), missing=_interpreted_missing)
