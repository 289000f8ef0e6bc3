"""What `bench gpu` measures: sampling and density cases, each one flow block of a large model, and who takes part."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tarflow_fast import Sampler, TarFlow, TarFlowConfig

from ...common import models
from ...common.harness import Candidate
from ...common.ml_tarflow import MlTarflow, autocast
from ...common.models import DRY_MODELS, MODELS, one_block, random_model
from ...common.roofline import Work, density_work, inverse_work

DTYPE = torch.bfloat16
GUIDANCE = 2.0
BASELINE = "ml-tarflow bf16 autocast"
TORCH, TRITON, COMPILED, CUDA = "torch", "triton", models.COMPILED, "cuda"  # samplers
BACKEND = "triton"
"""The backend of the candidate TRITON."""
DENSITY = "tarflow_fast bf16"
SIZES = {name: one_block(MODELS[name]) for name in ("afhq", "imagenet")}
DRY_BATCH = 3
CASES = (  # the most important first
    *(f"{model}:{batch}:guided" for model in SIZES for batch in (16, 1)),
    "afhq:128:guided",
    *(f"{model}:{batch}:unguided" for model in SIZES for batch in (16, 1)),
    "afhq:16:forward+backward",
    "imagenet:256:unguided",
    *(f"{model}:4:{what}" for model in SIZES for what in ("guided", "unguided")),
    "afhq:16:forward",
    "imagenet:16:forward",
    "imagenet:16:forward+backward",
    "afhq:128:unguided",
)
PASSES = ("guided", "unguided", "forward", "forward+backward")


@dataclass(frozen=True)
class Case:
    """direction: "inverse", "forward" or "forward+backward". dry: of sizes that an interpreter can do."""

    config: str
    batch: int
    guidance: float
    direction: str = "inverse"
    dry: bool = False

    @classmethod
    def parse(cls, text: str) -> Case:
        """Returns the case that is written MODEL:BATCH:PASS. Raises ValueError."""
        model, batch, what = (*text.split(":", 2), "", "")[:3]
        if model not in SIZES or what not in PASSES or not batch.isdecimal() or int(batch) < 1:
            known = f"MODEL one of {', '.join(SIZES)}; PASS of {', '.join(PASSES)}"
            raise ValueError(f"{text!r} is not MODEL:BATCH:PASS, with {known}")
        direction = "inverse" if what.endswith("guided") else what
        return cls(model, int(batch), GUIDANCE if what == "guided" else 0.0, direction)

    def made_dry(self) -> Case:
        return replace(self, batch=min(self.batch, DRY_BATCH), dry=True)

    @property
    def kind(self) -> str:
        return "sampling" if self.direction == "inverse" else "density"

    @property
    def label(self) -> dict[str, Any]:
        model = {"kind": self.kind, "model": self.config, "blocks": "1 of 8", "pass": self.direction}
        return {**model, "batch": self.batch, "guidance": self.guidance}

    @property
    def sizes(self) -> TarFlowConfig:
        return (DRY_MODELS if self.dry else SIZES)[self.config]

    @property
    def work(self) -> Work:
        size = DTYPE.itemsize
        if self.kind == "sampling":
            return inverse_work(self.sizes, self.batch, guided=self.guidance > 0, itemsize=size)
        return density_work(self.sizes, self.batch, backward=self.direction != "forward", itemsize=size)


@dataclass(frozen=True)
class Inputs:
    """model: in fp32 on the CPU. z: (B, T, D) and y: (B,), on the device."""

    model: TarFlow
    z: Tensor
    y: Tensor | None

    @classmethod
    def of(cls, case: Case, device: torch.device, seed: int) -> Inputs:
        return cls(random_model(case.sizes, seed), *models.inputs(case.sizes, case.batch, seed, device))


def exact_images(case: Case, inputs: Inputs, device: torch.device) -> Tensor:
    """Returns images in fp32 by the torch backend, for which a block is a second of work where ml-tarflow takes
    minutes. That this is no check of the torch backend by itself is the baseline's part: it has to agree as well."""
    sampler = Sampler(inputs.model, solver="sequential", backend="torch", device=device, dtype=torch.float32)
    return sampler.reverse(inputs.z, inputs.y, case.guidance)


def samplers(
    case: Case, inputs: Inputs, ml_tarflow: MlTarflow, device: torch.device, *, compiled: bool, cuda: bool
) -> dict[str, Candidate]:
    """Returns the candidates of a sampling case, the baseline first. compiled, cuda: whether these take part."""
    ours = {TORCH: "torch", TRITON: BACKEND, COMPILED: "torch", CUDA: "cuda"}
    # cuda is the last: a kernel that goes wrong can leave a process without a GPU
    ours = {name: backend for name, backend in ours.items() if {COMPILED: compiled, CUDA: cuda}.get(name, True)}

    def of(model: TarFlow) -> dict[str, Candidate]:
        arguments = (inputs.z[:, : model.config.num_patches], inputs.y, case.guidance)
        dtypes: dict[str, Any] = {"dtype": DTYPE, "their_dtype": DTYPE}
        return models.samplers(BASELINE, ml_tarflow, ours, model, arguments, device=device, **dtypes)

    def theirs() -> Callable[[], Tensor]:
        """Returns the baseline after it has been run on images of 2×2 tokens, with the same kernels and soon over."""
        height, width = case.sizes.patch_shape
        short = random_model(replace(case.sizes, img_size=(2 * height, 2 * width)), 0)
        of(short)[BASELINE]()()
        return of(inputs.model)[BASELINE]()

    return {**of(inputs.model), BASELINE: theirs}


def density_pass(model: Any, images: Tensor, y: Tensor | None, *, backward: bool) -> Tensor:
    """Returns (1,) the loss of images, or (2,) with the norm of its gradient over all parameters. model: of ours or
    theirs."""
    with torch.set_grad_enabled(backward):
        z, _, log_dets = model(images, y)
        loss = model.get_loss(z, log_dets)
    if not backward:
        return loss.float().view(1)
    model.zero_grad(set_to_none=True)
    loss.backward()
    gradients = [p.grad.float() for p in model.parameters() if p.grad is not None]
    return torch.stack([loss.detach().float(), torch.nn.utils.get_total_norm(gradients)])


def densities(
    case: Case, inputs: Inputs, ml_tarflow: MlTarflow, device: torch.device
) -> tuple[Tensor, dict[str, Candidate]]:
    """Returns the exact result, of our model in fp32, and the candidates: theirs under autocast, ours in bf16."""
    weights, images = inputs.model.state_dict(), inputs.model.unpatchify(inputs.z)
    loss = functools.partial(density_pass, images=images, y=inputs.y, backward=case.direction != "forward")

    def ours(dtype: torch.dtype) -> Callable[[], Tensor]:
        model = random_model(case.sizes, 0)
        model.load_state_dict(weights)
        return functools.partial(loss, model.to(device, dtype))

    def theirs() -> Callable[[], Tensor]:
        model = ml_tarflow.model(case.sizes, weights).to(device)
        return functools.partial(autocast(loss, device, DTYPE), model)

    return ours(torch.float32)(), {BASELINE: theirs, DENSITY: functools.partial(ours, DTYPE)}
