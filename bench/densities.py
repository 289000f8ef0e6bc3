"""The density pass and its gradient by the implementation that is asked for. The caller sets torch's threads."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from tarflow_fast import TarFlow, denoise

BACKENDS = ("auto", "cpu", "torch")


def with_density(model: TarFlow, backend: str, threads: int) -> TarFlow:
    """A copy of the model whose density pass is this backend's."""
    return copy.deepcopy(model).set_density(backend, None if backend == "torch" else threads)


def denoised(
    model: TarFlow,
    images: Tensor,
    y: Tensor | None,
    *,
    noise_std: float,
    backend: str,
    threads: int,
    batch_size: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`tarflow_fast.denoise` by this backend."""
    return denoise(
        model,
        images,
        y,
        noise_std=noise_std,
        batch_size=batch_size,
        dtype=dtype,
        backend=backend,
        threads=None if backend == "torch" else threads,
    )
