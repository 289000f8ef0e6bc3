"""What `bench gpu` measures: sampling and density cases, each one flow block of a large model, and who takes part."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tarflow_fast import TarFlow, TarFlowConfig

from ...common.harness import Candidate
from ...common.ml_tarflow import MlTarflow
from ...common.models import DRY_MODELS, MODELS, labels, latents, one_block, random_model, sequential_reverse
from ...common.roofline import Work, density_work, inverse_work

DTYPE = torch.bfloat16
GUIDANCE = 2.0
BASELINE = "ml-tarflow bf16 autocast"
TORCH, TRITON, COMPILED, CUDA = "torch", "triton", "torch compiled", "cuda"  # samplers
BACKEND = "triton"
"""The backend of the candidate TRITON."""
DENSITY = "tarflow_fast bf16"
SIZES = {name: one_block(MODELS[name]) for name in ("afhq", "imagenet")}
DRY_BATCH = 3
# fmt: off
CASES = (  # the most important first
    "afhq:16:guided", "afhq:1:guided", "imagenet:16:guided", "imagenet:1:guided", "afhq:128:guided",
    "afhq:16:unguided", "afhq:1:unguided", "imagenet:16:unguided", "imagenet:1:unguided",
    "afhq:16:forward+backward", "imagenet:256:unguided",
    "afhq:4:guided", "afhq:4:unguided", "imagenet:4:guided", "imagenet:4:unguided",
    "afhq:16:forward", "imagenet:16:forward", "imagenet:16:forward+backward", "afhq:128:unguided",
)
# fmt: on
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
        """MODEL:BATCH:PASS. Raises ValueError."""
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
        model, sizes = random_model(case.sizes, seed), case.sizes
        return cls(model, latents(sizes, case.batch, seed, device), labels(sizes, case.batch, device))


def _autocast(run: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    def under_autocast(*arguments: Any, **options: Any) -> Tensor:
        with torch.autocast(device.type, dtype=DTYPE):
            return run(*arguments, **options)

    return under_autocast


def _short(sizes: TarFlowConfig) -> TarFlowConfig:
    """The same model on images of 2×2 tokens: a pass has the same kernels and is over at once."""
    height, width = sizes.patch_shape
    return replace(sizes, img_size=(2 * height, 2 * width))


def exact_images(case: Case, inputs: Inputs, device: torch.device) -> Tensor:
    """Images in fp32 by the torch backend, for which a block is a second of work even where ml-tarflow takes minutes.
    That this is not the torch backend checking itself is the baseline's part: it has to agree with these too."""
    reverse = sequential_reverse(inputs.model, backend="torch", device=device, dtype=torch.float32)
    return reverse(inputs.z, inputs.y, case.guidance)


def samplers(
    case: Case, inputs: Inputs, ml_tarflow: MlTarflow, device: torch.device, *, compiled: bool, cuda: bool
) -> dict[str, Candidate]:
    """The baseline first; compiled, cuda: whether these take part."""

    def theirs() -> Callable[[], Tensor]:
        def reverse(model: TarFlow) -> Callable[[], Tensor]:
            z = inputs.z[:, : model.config.num_patches]
            return functools.partial(_autocast(ml_tarflow.reverse(model, device), device), z, inputs.y, case.guidance)

        reverse(random_model(_short(case.sizes), 0))()
        return reverse(inputs.model)

    def ours(backend: str, compile: bool = False) -> Callable[[], Tensor]:
        reverse = sequential_reverse(inputs.model, backend=backend, device=device, dtype=DTYPE, compile=compile)
        return functools.partial(reverse, inputs.z, inputs.y, case.guidance)

    found: dict[str, Candidate] = {BASELINE: theirs, TORCH: lambda: ours("torch"), TRITON: lambda: ours(BACKEND)}
    if compiled:
        found[COMPILED] = lambda: ours("torch", compile=True)
    if cuda:  # last: a kernel that goes wrong can leave a process without a GPU
        found[CUDA] = lambda: ours("cuda")
    return found


def density_pass(model: Any, images: Tensor, y: Tensor | None, *, backward: bool) -> Tensor:
    """(1,) the loss of images, or (2,) with the norm of its gradient over all parameters. model: ours or theirs."""
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
    """The exact result, of our model in fp32, and the candidates: theirs under autocast, ours with bf16 weights."""
    images = inputs.model.unpatchify(inputs.z)
    loss = functools.partial(density_pass, images=images, y=inputs.y, backward=case.direction != "forward")

    def ours(dtype: torch.dtype) -> Callable[[], Tensor]:
        model = random_model(case.sizes, 0)
        model.load_state_dict(inputs.model.state_dict())
        return functools.partial(loss, model.to(device, dtype))

    def theirs() -> Callable[[], Tensor]:
        model = ml_tarflow.model(case.sizes, inputs.model.state_dict()).to(device)
        return functools.partial(_autocast(loss, device), model)

    return ours(torch.float32)(), {BASELINE: theirs, DENSITY: functools.partial(ours, DTYPE)}
