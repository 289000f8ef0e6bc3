"""What scripts written for ml-tarflow's `Model` do with a model, and what people do with a `Sampler` beside that."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import random_images, random_latents, random_model
from children import draw
from tolerances import GOLDEN, assert_close
from torch import Tensor, nn

from tarflow_fast import (
    ArgumentError,
    NonFiniteError,
    Sampler,
    TarFlow,
    TarFlowError,
    accelerate,
    denoise,
    load_pretrained,
    reference,
)
from tarflow_fast.backend.cpu.engine import cpu_missing

NATIVE = pytest.param("cpu", marks=pytest.mark.skipif(cpu_missing() is not None, reason=str(cpu_missing())))
backends = pytest.mark.parametrize("backend", ["torch", NATIVE])


def overflowing(**sizes: Any) -> TarFlow:
    """A model whose images overflow for some latents, and do not for others."""
    model = random_model(num_classes=3, **sizes)
    with torch.no_grad():
        for block in model.blocks:
            block.proj_out.weight *= 2  # type: ignore[operator, union-attr]
    return model


# What is not finite


@backends
@pytest.mark.parametrize("solver", ["sequential", "adaptive"])
def test_images_that_overflow_are_returned_beside_the_others(backend: str, solver: str) -> None:
    model = overflowing()
    sampler, z = Sampler(model, backend=backend, solver=solver), 2 * random_latents(model, 60)
    images = sampler.reverse(z, 1, on_nonfinite="return")
    finite = images.isfinite().flatten(1).all(1)
    assert 0 < finite.sum() < 60
    assert torch.equal(model.reverse(z, 1).isfinite().flatten(1).all(1), finite)
    if solver == "sequential":
        alone = sampler.reverse(z[finite], 1)
        scale = 1 + alone.abs().amax((1, 2, 3), keepdim=True)
        assert_close(images[finite] / scale, alone / scale, 1e-4)
    with pytest.raises(NonFiniteError) as caught:
        sampler.reverse(z, 1)
    assert caught.value.sample == int((~finite).nonzero()[0])
    with pytest.raises(NonFiniteError):
        model.reverse(z, 1, on_nonfinite="raise")
    with pytest.raises(ArgumentError, match="on_nonfinite"):
        sampler.reverse(z, 1, on_nonfinite="redraw")


@pytest.mark.parametrize("backend", ["torch", NATIVE])
def test_denoising_never_gives_infinities(backend: str) -> None:
    model = random_model(num_classes=3)
    images = random_images(model, 3)
    images[1] *= 1e38
    with pytest.raises(TarFlowError, match="for image 1: "):
        denoise(model, images, 0, noise_std=1.0, backend=backend)


def test_what_is_far_out_of_range_is_said() -> None:
    model, images = random_model(), random_images(random_model(), 2).clamp(-1, 1)
    model.log_prob(127.5 * images)  # nothing is known of what it was trained on
    model.metadata = {"noise_std": 0.3, "noise_type": "gaussian"}
    with torch.no_grad():
        model.log_prob(3 * images)
        with pytest.warns(UserWarning, match=r"^x: values of up to 12\d"):
            model.bits_per_dim(127.5 * images)
        with pytest.warns(UserWarning, match=r"^x: values of up to \d+, where noise"):
            model.reverse(50 * random_latents(model, 2))


# Log-determinants


@backends
@pytest.mark.parametrize("sizes", [{}, {"num_classes": 3}, {"num_classes": 3, "nvp": False}], ids=str)
def test_reverse_tells_the_log_det(backend: str, sizes: dict[str, Any]) -> None:
    model = random_model(**sizes)
    y, rule = (torch.tensor([2, -1]), {"guidance": 1.0, "annealed_guidance": True}) if sizes else (None, {})
    z, weights = random_latents(model, 2), model.state_dict()
    sampler = Sampler(model, backend=backend, solver="sequential")
    images, log_det = sampler.reverse(z, y, return_log_det=True)
    wanted = reference.inverse(weights, z, y)
    assert_close(log_det, wanted.log_det, GOLDEN)
    assert torch.equal(images, sampler.reverse(z, y))
    log_prob = torch.distributions.Normal(0, 1).log_prob(z).sum((1, 2)) - log_det
    assert_close(log_prob, model.log_prob(images, y), 1e-3)
    _, guided = model.reverse(z, y, return_log_det=True, **rule)
    assert_close(guided, reference.inverse(weights, z, y, **rule).log_det, GOLDEN)
    sequence, again = sampler.reverse(z, y, return_sequence=True, return_log_det=1)
    assert len(sequence) == model.config.num_blocks + 1
    assert torch.equal(again, log_det)


# Modes of torch


@backends
def test_inference_mode(backend: str) -> None:
    model, z = random_model(num_classes=3), random_latents(random_model(), 2)
    model.metadata["noise_std"] = 0.1

    def all_of_it(model: TarFlow, sampler: Sampler) -> list[Tensor]:
        kind = "cpu" if backend == "cpu" else "torch"
        return [
            sampler.sample(2, [0, 1], denoise=True).images,
            denoise(model, random_images(model, 2), 1, backend=kind),
            sampler.reverse(z, torch.tensor([0, -1])),
            model.reverse(z, 1),
            sampler.learn_plan(2, 1).slope,
        ]

    wanted = all_of_it(model, Sampler(model, backend=backend, solver="adaptive"))
    with torch.inference_mode():
        within = copy.deepcopy(model)
        sampler = Sampler(within, backend=backend, solver="adaptive")
        under = all_of_it(within, sampler)
    after = all_of_it(within, sampler)
    with torch.inference_mode():
        mixed = all_of_it(model, Sampler(model, backend=backend, solver="adaptive"))
    for got in (under, after, mixed):
        assert all(map(torch.equal, got, wanted))
    assert not any(tensor.requires_grad for tensor in after)


@pytest.mark.slow
def test_compiled_and_wrapped_models_are_models() -> None:
    model, x = random_model(num_classes=3), random_images(random_model(), 2)
    y = torch.tensor([0, -1])
    compiled: Any = torch.compile(model, backend="eager")
    wanted = model(x, y)
    got = compiled(x, y)
    assert_close(got[0], wanted[0], GOLDEN)
    assert_close(got[2], wanted[2], GOLDEN)
    z = random_latents(model, 2)
    assert_close(accelerate(compiled).reverse(z, y), model.reverse(z, y), GOLDEN)
    assert_close(compiled.reverse(z, y), model.reverse(z, y), GOLDEN)
    assert_close(accelerate(nn.DataParallel(model)).reverse(z, y), model.reverse(z, y), GOLDEN)


# Copies, and other processes


@backends
def test_copies(backend: str) -> None:
    model = random_model(num_classes=2)
    model.metadata = {"class_names": ["cat", "dog"], "noise_std": 0.1}
    plan = Sampler(model, backend=backend).learn_plan(4, [0, 1])
    for sampler in (
        Sampler(model, backend=backend, solver="sequential", threads=2 if backend == "cpu" else None),
        Sampler(model, backend=backend, solver="adaptive", tol=1e-4, plan=plan, dtype=torch.bfloat16),
    ):
        wanted = sampler.sample(3, "dog", denoise=True)
        shared = copy.copy(sampler)
        assert shared is not sampler
        assert shared.flow is sampler.flow
        for copied in (shared, copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
            got = copied.sample(3, "dog", denoise=True)
            assert torch.equal(got.images, wanted.images)
            assert (got.report.solver, got.report.backend, got.report.dtype) == (
                *(wanted.report.solver, wanted.report.backend),
                wanted.report.dtype,
            )
        with torch.no_grad():  # neither is another's
            copy.deepcopy(sampler).flow.prior_var.mul_(2)
        assert torch.equal(sampler.sample(3, "dog", denoise=True).images, wanted.images)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_a_sampler_goes_to_other_processes(method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    sampler = Sampler(load_pretrained(), solver="sequential")
    with multiprocessing.get_context(method).Pool(1) as pool:
        got = pool.apply_async(draw, (sampler,)).get(100)
    assert torch.equal(got, draw(sampler))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize("backend", [pytest.param("torch", marks=pytest.mark.slow), NATIVE])
def test_a_forked_child_of_a_process_that_computed_with_threads(backend: str) -> None:
    """torch's OpenMP threads do not live on in a child, whose first large operation waits for them without end."""
    code = """
import os, sys, torch, tarflow_fast as tff
torch.set_num_threads(2)
sampler = tff.Sampler(tff.load_pretrained(), backend=sys.argv[1], solver="sequential")
wanted = sampler.sample(16, 0, denoise=True).images
torch.randn(700, 700) @ torch.randn(700, 700)
child = os.fork()
if child == 0:
    again = tff.Sampler(tff.load_pretrained(), backend=sys.argv[1], solver="sequential")
    same = all(torch.equal(s.sample(16, 0, denoise=True).images, wanted) for s in (sampler, again))
    os._exit(0 if same and torch.get_num_threads() == 2 else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    command = [sys.executable, "-W", "ignore", "-c", code, backend]
    assert subprocess.run(command, timeout=100, check=False).returncode == 0


# State dicts


def test_state_dicts_go_both_ways(tmp_path: Path) -> None:
    """Under ml-tarflow's keys, strictly, whichever has been to a file; var comes with them."""
    model = random_model(4, nvp=False, num_classes=3)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    other = random_model(5, nvp=False, num_classes=3)
    assert (
        str(other.load_state_dict(torch.load(tmp_path / "model.pth"), strict=True)) == "<All keys matched successfully>"
    )
    assert torch.equal(other.var, model.var)
    assert set(model.state_dict()) >= {"var", "blocks.0.attn_mask", "blocks.1.class_embed"}
    z = random_latents(model, 2)
    assert torch.equal(other.reverse(z, 0), model.reverse(z, 0))
