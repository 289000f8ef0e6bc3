"""Whether the kernel of the density pass may serve: where a kept verdict says that it is right on this device."""

from __future__ import annotations

import torch

from .job import DensityJob
from .prober import read
from .store import Entry, density_key

_answers: dict[tuple[torch.device, int, int, bool], bool] = {}


@torch.compiler.assume_constant_result
def density_proven(device: torch.device, tokens: int, token_dim: int, affine: bool) -> bool:
    """Returns whether a probe has proven the kernel for blocks of T tokens of D values on this device.

    The answer stays as it is for the whole of a process, so that one run of training or of an evaluation rounds in one
    way from beginning to end. `tarflow-fast check` and the probes of a sampler make the verdict for later processes.
    """
    key = (device, tokens, token_dim, affine)
    if key not in _answers:
        verdict = read(Entry(density_key(DensityJob(*key))))
        _answers[key] = verdict is not None and verdict.proven
    return _answers[key]
