"""The kernel of the density pass: a right one passes, each fault is found, and none serves without a verdict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import KERNEL_DEVICE
from torch import Tensor

from tarflow_fast.devices import triton_missing
from tarflow_fast.engine.verdict import Verdict
from tarflow_fast.probe import density, density_gate, prober
from tarflow_fast.probe.job import DensityJob
from tarflow_fast.probe.store import Entry, density_key

CPU = torch.device("cpu")
JOB = DensityJob(CPU, tokens=6, token_dim=3, affine=True, repeats=3)


def faults(kernel: Callable[..., Any], job: DensityJob = JOB) -> list[str | None]:
    return [density.check_density(job, kernel, case).fault for case in density.density_cases()]


@pytest.mark.parametrize("affine", [True, False])
def test_a_right_one_passes(affine: bool) -> None:
    job = DensityJob(CPU, tokens=6, token_dim=3, affine=affine, repeats=2)
    assert faults(density.plain_density, job) == [None] * 6


@pytest.mark.skipif(triton_missing() is not None, reason=str(triton_missing()))
@pytest.mark.parametrize("affine", [True, False])
def test_the_kernel_passes(affine: bool) -> None:
    from tarflow_fast.kernels.affine_density import affine_density

    job = DensityJob(KERNEL_DEVICE, tokens=5, token_dim=3, affine=affine, repeats=2)
    assert faults(affine_density, job) == [None] * 6


class Spoilt(torch.autograd.Function):
    """The identity, whose gradient is a little off."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 1.001 * gradient


def wrong_values(out: Tensor, x: Tensor, affine: bool, flip: bool) -> tuple[Tensor, Tensor]:
    z, log_det = density.plain_density(out, x, affine, flip)
    return z + 1e-3, log_det


def wrong_gradient(out: Tensor, x: Tensor, affine: bool, flip: bool) -> tuple[Tensor, Tensor]:
    z, log_det = density.plain_density(out, x, affine, flip)
    return Spoilt.apply(z), log_det


def leaking(out: Tensor, x: Tensor, affine: bool, flip: bool) -> tuple[Tensor, Tensor]:
    z, log_det = density.plain_density(out, x, affine, flip)
    return z + 0 * z.sum(), log_det


class Restless:
    """Other bits each time."""

    calls = 0

    def __call__(self, out: Tensor, x: Tensor, affine: bool, flip: bool) -> tuple[Tensor, Tensor]:
        self.calls += 1
        z, log_det = density.plain_density(out, x, affine, flip)
        return z + 1e-7 * self.calls, log_det


def writing(out: Tensor, x: Tensor, affine: bool, flip: bool) -> tuple[Tensor, Tensor]:
    result = density.plain_density(out, x, affine, flip)
    with torch.no_grad():
        x += 1
    return result


FAULTS = {
    "values": (wrong_values, "z 0.001 off, and at most"),
    "gradient": (wrong_gradient, "dout 0.00"),
    "NaN": (leaking, "NaN in sample 0 changes another sample"),
    "bits": (Restless(), "other bits when it is repeated"),
    "inputs": (writing, "an input changed"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found(fault: str) -> None:
    kernel, said = FAULTS[fault]
    assert str(faults(kernel)[0]).startswith(said)


def test_it_serves_where_a_verdict_is_kept_and_as_long_as_the_process_lives(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    answers: dict[Any, bool] = {}
    monkeypatch.setattr(density_gate, "_answers", answers)
    block = (CPU, 6, 3, True)
    assert not density_gate.density_proven(*block)
    entry = Entry(density_key(DensityJob(*block)))
    entry.write(Verdict(True, "6 checks passed"))
    assert not density_gate.density_proven(*block)  # one process rounds in one way
    answers.clear()
    assert density_gate.density_proven(*block)
    assert not density_gate.density_proven(CPU, 7, 3, True)
    prober._known.clear()
    answers.clear()
    entry.write(Verdict(False, "wrong"))
    assert not density_gate.density_proven(*block)


def test_compiled_code_asks_once() -> None:
    """The answer is a constant of what torch.compile makes."""
    assert getattr(density_gate.density_proven, "_dynamo_marked_constant", False)
