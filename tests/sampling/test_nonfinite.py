"""Samples that are not finite are named, or drawn again."""

from __future__ import annotations

import pytest
import torch
from cases import GOLDEN as CASES
from cases import random_model
from tolerances import BATCH, assert_close

from tarflow_fast import reference
from tarflow_fast.errors import NonFiniteError
from tarflow_fast.models.tarflow import TarFlow
from tarflow_fast.sampling.noise import latent_noise
from tarflow_fast.sampling.sampler import Sampler

golden = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def explosive_model(bias: float) -> TarFlow:
    """xa grows with |x|: images with large noise overflow, others do not."""
    model = random_model(4)
    with torch.no_grad():
        for block in model.blocks:
            block.proj_out.weight *= 2.5  # type: ignore[operator, union-attr]
            block.proj_out.bias += bias  # type: ignore[operator, union-attr]
    return model


def first_failure(model: TarFlow, number: int) -> tuple[int, int] | None:
    """(block, token) at which image `number` of seed 0 first is not finite, by the reference in fp32."""
    weights = model.state_dict()
    x = latent_noise(0, [number], model.config.num_patches, model.config.token_dim)
    for k in reversed(range(model.config.num_blocks)):
        x, _ = reference.block_inverse(weights, k, x)
        tokens = x.flip(1) if k % 2 else x
        bad = (~torch.isfinite(tokens[0]).all(-1)).nonzero()
        if len(bad):
            return k, int(bad[0])
    return None


def test_nonfinite_samples_are_named() -> None:
    model = explosive_model(0.0)
    failures = {number: first_failure(model, number) for number in range(12)}
    broken = [number for number, where in failures.items() if where]
    assert 0 < len(broken) < 12
    number = broken[0]
    block, token = failures[number] or (-1, -1)
    s = Sampler(model)
    with pytest.raises(NonFiniteError) as caught:
        s.sample(12)
    assert (caught.value.sample, caught.value.block, caught.value.token) == (number, block, token)
    assert f"block {block}, token {token}" in str(caught.value)
    z = latent_noise(0, [number], model.config.num_patches, model.config.token_dim)
    with pytest.raises(NonFiniteError, match="sample 0"):
        s.reverse(z)


def test_redraw_replaces_broken_samples_alone() -> None:
    model = explosive_model(0.0)
    s = Sampler(model)
    broken = {number for number in range(12) if first_failure(model, number)}
    out = s.sample(12, on_nonfinite="redraw", batch_size=5)
    assert set(out.report.redrawn) == broken
    assert torch.isfinite(out.images).all()
    for number in range(12):
        attempt = out.report.redrawn.get(number, 0)
        z = latent_noise(0, [number], model.config.num_patches, model.config.token_dim, attempt)
        assert_close(out.images[[number]], s.reverse(z), BATCH * float(out.images[number].abs().max()))


def test_redraw_gives_up() -> None:
    model = explosive_model(200.0)
    with pytest.raises(NonFiniteError):
        Sampler(model).sample(2, on_nonfinite="redraw")
