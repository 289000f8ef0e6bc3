"""The laws that a probe holds the kernel of the density pass's affine transform to, forward and backward."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .job import DensityJob
from .laws import FLOOR, TIMES, Finding
from .zones import RedZones

BATCH = 3
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class DensityCase:
    """A dtype of the outputs, and whether the block reads the tokens in the opposite order."""

    dtype: torch.dtype
    flip: bool

    @property
    def name(self) -> str:
        """Returns the name of the check."""
        return f"{str(self.dtype).removeprefix('torch.')}{', reversed' * self.flip}"


def density_cases() -> list[DensityCase]:
    """Returns all checks."""
    return [DensityCase(dtype, flip) for dtype, flip in itertools.product(DTYPES, (False, True))]


def plain_density(out: Tensor, x: Tensor, affine: bool, flip: bool) -> tuple[Tensor, Tensor]:
    """z_0 = x_0, z_{i+1} = (x_{i+1} − xb_i) · exp(−xa_i), and −Σ_d xa of each token, by PyTorch, in x's dtype."""
    x = x.flip(1) if flip else x
    before = F.pad(out.to(x.dtype)[:, :-1], (0, 0, 1, 0))  # row i is what transforms token i
    xa, xb = before.chunk(2, -1) if affine else (torch.zeros_like(before), before)
    z = (x - xb) * torch.exp(-xa)
    return (z.flip(1) if flip else z), -xa.sum(-1)


def check_density(job: DensityJob, kernel: Callable[..., tuple[Tensor, Tensor]], case: DensityCase) -> Finding:
    """Returns what is found by this case: accuracy of values and gradients, NaN, repeats, red zones, inputs."""
    out, x, seeds = _inputs(job, case.dtype)
    zones = RedZones()
    given = [tensor.clone() for tensor in (out, x, *seeds)]
    run = functools.partial(_pull, affine=job.affine, flip=case.flip)
    with zones:
        out, x = zones.around(out), zones.around(x)
        got = run(kernel, out, x, seeds)
        again = [run(kernel, out, x, seeds) for _ in range(job.repeats - 1)]
        spoilt_out, spoilt_x = out.clone(), x.clone()
        spoilt_out[0], spoilt_x[0] = torch.nan, torch.nan
        beside = run(kernel, spoilt_out, spoilt_x, seeds)
    plain_out, plain_x, *plain_seeds = given
    exact = run(plain_density, plain_out.double(), plain_x.double(), [seed.double() for seed in plain_seeds])
    peer = run(plain_density, plain_out, plain_x, plain_seeds)
    fault = zones.broken()
    if any(not torch.equal(a, b) for a, b in zip((out, x, *seeds), given, strict=True)):
        fault = "an input changed"
    elif any(not torch.equal(a, b) for each in again for a, b in zip(each, got, strict=True)):
        fault = "other bits when it is repeated"
    elif any(not torch.equal(a[1:], b[1:]) for a, b in zip(beside, got, strict=True)):
        fault = "NaN in sample 0 changes another sample"
    if fault is not None:
        return Finding(fault=fault)
    worst = Finding(0.0, float("inf"))
    for name, mine, theirs, sure in zip(("z", "log-det", "dout", "dx"), got, peer, exact, strict=True):
        dtype = mine.dtype
        off = [(each.double() - sure).abs().max().item() for each in (mine, theirs)]
        allowed = TIMES * off[1] + FLOOR[dtype] * torch.finfo(dtype).eps * sure.abs().max().item()
        if not off[0] <= allowed:
            return Finding(off[0], allowed, f"{name} {off[0]:.3g} off, and at most {allowed:.3g} would do")
        worst = max(worst, Finding(off[0], allowed), key=lambda found: (found.error or 0) / (found.allowed or 1))
    return worst


def _inputs(job: DensityJob, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    T, D = job.tokens, job.token_dim

    def noise(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device="cpu", dtype=torch.float32).to(job.device)

    out = 0.3 * noise(BATCH, T, 2 * D if job.affine else D)
    return out.to(dtype), noise(BATCH, T, D), [noise(BATCH, T, D), noise(BATCH, T)]


def _pull(
    function: Callable[..., Any], out: Tensor, x: Tensor, seeds: Sequence[Tensor], *, affine: bool, flip: bool
) -> list[Tensor]:
    """Returns z, the log-dets, and the gradients of Σ seeds · results in `out` and x."""
    out, x = out.detach().requires_grad_(), x.detach().requires_grad_()
    with torch.enable_grad():
        z, log_det = function(out, x, affine, flip)
        loss = (z * seeds[0]).sum() + (log_det * seeds[1]).sum() if affine else (z * seeds[0]).sum()
        gradients = torch.autograd.grad(loss, (out, x))
    return [z.detach(), log_det.detach(), *gradients]
