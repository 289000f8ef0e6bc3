"""Whole images by the backends that have kernels: the golden ones, and those of the torch backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import GOLDEN as CASES
from cases import KERNEL_DEVICE, Case, random_model
from engines import CUDA
from tolerances import GOLDEN, assert_close

from tarflow_fast import Sampler


def of_kernels(case: Case) -> list[Any]:
    """A golden case for both. Triton's interpreter takes many seconds for each, so that most of them are slow tests."""
    long = KERNEL_DEVICE.type == "cpu" and case.name not in ("vp", "cond_cfg_b")
    triton = pytest.param("triton", case, marks=[pytest.mark.slow] if long else [], id=f"{case.name}-triton")
    return [triton, pytest.param("cuda", case, marks=CUDA.marks, id=f"{case.name}-cuda")]


@pytest.mark.parametrize(("backend", "case"), [each for case in CASES for each in of_kernels(case)])
def test_golden_images(backend: str, case: Case) -> None:
    y = None if case.y is None else case.y.to(KERNEL_DEVICE)
    sampler = Sampler(case.model(), backend=backend, device=KERNEL_DEVICE)
    images = sampler.reverse(case.tensor("in.z").to(KERNEL_DEVICE), y, **case.reverse_args)
    assert isinstance(images, torch.Tensor)
    assert_close(images, case.tensor("out.reverse"), GOLDEN)


@pytest.mark.parametrize("backend", ["triton", CUDA])
def test_samples_and_their_likelihood_are_those_of_the_torch_backend(backend: str) -> None:
    model = random_model(num_classes=3, img_size=6)
    ours, wanted = (
        Sampler(model, backend=name, device=KERNEL_DEVICE).sample(3, [0, -1, 2], batch_size=2)
        for name in (backend, "torch")
    )
    assert_close(ours.images, wanted.images, GOLDEN)
    assert ours.log_prob is not None
    assert wanted.log_prob is not None
    assert_close(ours.log_prob, wanted.log_prob, 1e-3)
    assert (ours.report.backend, ours.report.backend_reason) == (backend, "asked for")
