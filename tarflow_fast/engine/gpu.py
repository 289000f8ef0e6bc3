"""What the engines on GPUs refuse alike."""

from __future__ import annotations

import torch

from ..checks import short

GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = (8, 0)  # the compute capability that has bf16 and asynchronous copies


def gpu_missing(engine: str, runs_there: bool, device: torch.device, dtype: torch.dtype, compile: bool) -> str | None:
    """Returns why an engine on GPUs cannot serve such a request, and what would mend that, or None if it can.

    engine: what messages call the engine. runs_there: whether it runs on devices of this kind. device, dtype, compile:
    those of the request.
    """
    if not runs_there:
        return f"{engine} needs a CUDA device, and this is {device}; use device='cuda'"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"{torch.cuda.get_device_name(device)} is older than compute capability {oldest}; use backend='torch'"
    if dtype not in GPU_DTYPES:
        return f"{engine} has no {short(dtype)}; use float32, bfloat16 or float16, or backend='torch'"
    if compile:
        return f"torch.compile has nothing to compile in {engine}; leave compile out, or use backend='torch'"
    return None
