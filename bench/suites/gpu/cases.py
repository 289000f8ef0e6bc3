"""What `bench gpu` measures: sampling and density cases, each one flow block of a large model, and who takes part."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import click
import torch
from torch import Tensor

from tarflow_fast import Sampler, TarFlow

from ...common import models
from ...common.harness import Candidate, Case
from ...common.ml_tarflow import MlTarflow, autocast
from ...common.models import ONE_BLOCK as SIZES
from ...common.models import random_model
from ...common.roofline import density_work, inverse_work

DTYPE = torch.bfloat16
BASELINE, DENSITY = "ml-tarflow bf16 autocast", "tarflow_fast bf16"
TORCH, TRITON, COMPILED, CUDA = "torch", "triton", models.COMPILED, "cuda"  # samplers
BACKEND = "triton"  # of the candidate TRITON
GUIDANCE = {"guided": 2.0, "unguided": 0.0}
PASSES = (*GUIDANCE, "loss")
DRY_BATCH = 3
CASES = (  # the most important first
    *(f"{model}:{batch}:guided" for model in SIZES for batch in (16, 1)),
    "afhq:128:guided",
    *(f"{model}:{batch}:unguided" for model in SIZES for batch in (16, 1)),
    "afhq:16:loss",
    "imagenet:256:unguided",
    *(f"{model}:4:{what}" for model in SIZES for what in GUIDANCE),
    *("imagenet:16:loss", "afhq:128:unguided"),
)


def case_of(text: str, dry: bool = False) -> Case:
    """Returns the case that is written MODEL:BATCH:PASS; dry: of tiny sizes. Raises click.BadParameter."""
    found = re.fullmatch(rf"({'|'.join(SIZES)}):([1-9]\d*):({'|'.join(PASSES)})", text)
    if found is None:
        known = f"MODEL one of {', '.join(SIZES)}; PASS of {', '.join(PASSES)}"
        raise click.BadParameter(f"{text!r} is not MODEL:BATCH:PASS, with {known}")
    model, what, batch = found[1], found[3], min(int(found[2]), DRY_BATCH) if dry else int(found[2])
    sizes, how = (models.DRY if dry else SIZES)[model], {"itemsize": DTYPE.itemsize}
    work = density_work(sizes, batch, backward=True, **how)
    if what in GUIDANCE:
        work = inverse_work(sizes, batch, guided=GUIDANCE[what] > 0, **how)
    return Case({"model": model, "batch": batch, "pass": what}, sizes, work, "bfloat16")


def exact_images(model: TarFlow, inputs: tuple[Any, ...], device: torch.device) -> Tensor:
    """Returns images in fp32 by the torch backend, for which a block is a second of work where ml-tarflow takes
    minutes. That this is no check of the torch backend by itself is the baseline's part: it has to agree as well."""
    sampler = Sampler(model, solver="sequential", backend="torch", device=device, dtype=torch.float32)
    return sampler.reverse(*inputs)


def samplers(
    model: TarFlow, inputs: tuple[Any, ...], theirs: MlTarflow, device: torch.device, compiled: bool, cuda: bool
) -> dict[str, Candidate]:
    """Returns the candidates of a sampling case, the baseline first. compiled, cuda: whether these take part."""
    ours = {TORCH: "torch", TRITON: BACKEND, **({COMPILED: "torch"} if compiled else {})}
    ours |= {CUDA: "cuda"} if cuda else {}  # the last: a kernel that goes wrong can leave a process without a GPU
    return models.samplers(BASELINE, theirs, ours, model, inputs, device, DTYPE, their_dtype=DTYPE)


def loss_and_norm(model: Any, images: Tensor, y: Tensor | None) -> Tensor:
    """Returns (2,) the loss of images, and the norm of its gradient over all parameters. model: of ours or theirs."""
    z, _, log_dets = model(images, y)
    loss = model.get_loss(z, log_dets)
    model.zero_grad(set_to_none=True)
    loss.backward()
    gradients = [p.grad.float() for p in model.parameters() if p.grad is not None]
    return torch.stack([loss.detach().float(), torch.nn.utils.get_total_norm(gradients)])


def densities(
    case: Case, model: TarFlow, z: Tensor, y: Tensor | None, theirs: MlTarflow, device: torch.device
) -> tuple[Tensor, dict[str, Candidate]]:
    """Returns the exact result, of our model in fp32, and the candidates: theirs under autocast, ours in bf16."""
    weights, images = model.state_dict(), model.unpatchify(z)
    loss = functools.partial(loss_and_norm, images=images, y=y)

    def ours(dtype: torch.dtype) -> Callable[[], Tensor]:
        made = random_model(case.sizes, 0)
        made.load_state_dict(weights)
        return functools.partial(loss, made.to(device, dtype))

    def published() -> Callable[[], Tensor]:
        return functools.partial(autocast(loss, device, DTYPE), theirs.model(case.sizes, weights).to(device))

    return ours(torch.float32)(), {BASELINE: published, DENSITY: functools.partial(ours, DTYPE)}
