"""What was learnt of a model for the adaptive solver: where its passes are to start.

A pass refines guesses, and the better the first one, the fewer passes. The guess is affine for each position and value,

    x ≈ slope · z + shift,      slope = cov(z, x) / var(z),   shift = mean(x) − slope · mean(z),

fitted by least squares to the tokens that each flow block took in and gave out for images of the model itself.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..errors import ArgumentError, CheckpointError


@dataclass(frozen=True, eq=False)
class SolverPlan:
    """slope, shift: (K, T, D) fp32, by flow block, each in its own token order."""

    slope: Tensor
    shift: Tensor

    @classmethod
    def fit(cls, pairs: list[tuple[Tensor, Tensor]]) -> SolverPlan:
        """pairs: what each block took in and gave out, (n, T, D) each, by block and in its token order, n >= 2."""
        slopes, shifts = [], []
        for z, x in pairs:
            mean_z, mean_x = z.mean(0), x.mean(0)
            slope = ((z - mean_z) * (x - mean_x)).mean(0) / (z - mean_z).square().mean(0)
            slopes.append(slope)
            shifts.append(mean_x - slope * mean_z)
        return cls(torch.stack(slopes).float().cpu(), torch.stack(shifts).float().cpu())

    def guess(self, k: int, z: Tensor) -> Tensor:
        """Where block k's passes start for the latents z: (B, T, D) in the block's token order."""
        slope, shift = self.slope[k].to(z), self.shift[k].to(z)
        return torch.addcmul(shift, slope, z)

    def check(self, shape: tuple[int, int, int]) -> SolverPlan:
        """Raises ArgumentError unless this plan is of a model of (K, T, D) = shape, and finite."""
        for field in fields(self):
            tensor = getattr(self, field.name)
            if tuple(tensor.shape) != shape:
                raise ArgumentError("plan", f"one of a model with (blocks, tokens, values) = {shape}", tensor.shape)
            if not torch.isfinite(tensor).all():
                raise ArgumentError("plan", "finite values", f"infinities or NaNs in its {field.name}")
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """As a `.safetensors` file."""
        path = Path(path)
        if path.suffix != ".safetensors":
            raise ArgumentError("path's suffix", "'.safetensors'", repr(path.suffix))
        tensors = {field.name: getattr(self, field.name).contiguous() for field in fields(self)}
        path.write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SolverPlan:
        """What `save` wrote. Raises CheckpointError for anything else."""
        try:
            tensors = safetensors.torch.load(Path(path).read_bytes())
            return cls(**tensors)
        except (OSError, TypeError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{path}: not a solver plan ({str(error).splitlines()[0]})") from error
