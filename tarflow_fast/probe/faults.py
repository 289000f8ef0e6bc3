"""Errors after which a device can no longer be used by this process, and what is done about them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence

import torch

from ..backend.registry import backend_named, names
from ..engine.backend import Request
from ..engine.shape import BlockShape
from ..errors import DeviceFault, first_line
from .prober import Prober

_LASTING = re.compile(
    "illegal memory access|IllegalAddress|unspecified launch failure|LaunchFailure|device-side assert|cudaErrorAssert|"
    "illegal instruction|IllegalInstruction|misaligned address|MisalignedAddress|invalid program counter|InvalidPc|"
    "hardware stack|HardwareStack|launch timed out|LaunchTimeout|uncorrectable ECC|ECCUncorrectable"
)


def breaks_device(error: BaseException, device: torch.device) -> bool:
    """Returns whether nothing more can be computed on the device after this error of the CUDA runtime or driver."""
    if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, RuntimeError):
        return False
    if _LASTING.search(str(error)):
        return True
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            return True
    return False


@contextlib.contextmanager
def naming_faults(served: Callable[[], str], shapes: Sequence[BlockShape], request: Request) -> Iterator[None]:
    """Raise DeviceFault in the place of an error that breaks the device, and revoke the backend's verdicts.

    served: a function that returns the name of the backend that serves the passes of the block. shapes, request: see
    `Prober`.
    """
    try:
        yield
    except RuntimeError as error:
        if not breaks_device(error, request.device):
            raise
        name, why = served(), first_line(error)
        advice = "start a new process to go on"
        if name in names() and backend_named(name).probed:
            Prober(shapes, request, "never").revoke(name, f"it broke the device while it sampled: {why}")
            advice += f", in which backend='auto' does without {name!r} (`tarflow-fast check --again` probes it anew)"
        raise DeviceFault(name, why, advice) from error
