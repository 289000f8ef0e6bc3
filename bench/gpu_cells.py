"""What `bench gpu` measures: sampling and density cells, each one flow block of a large model, and who takes part."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tarflow_fast import Sampler, TarFlow, TarFlowConfig
from tarflow_fast.sampling.noise import latent_noise

from .cells import Cell, random_model
from .cuda_table import CUDA
from .published import Published
from .roofline import Work, density_work, inverse_work
from .trials import Contestant

BACKEND = "triton"
"""Which backend the contestant TRITON is."""
DTYPE = torch.bfloat16
GUIDANCE = 2.0
BASELINE = "ml-tarflow bf16 autocast"
TORCH, TRITON, COMPILED = "torch", "triton", "torch compiled"  # samplers, beside CUDA
DENSITY = "tarflow_fast bf16"
MODELS = {  # one of their 8 flow blocks
    "afhq": TarFlowConfig(3, 256, 8, 768, 1, 8, num_classes=3),
    "imagenet": TarFlowConfig(3, 64, 2, 768, 1, 8, num_classes=1000),
}
DRY_MODELS = {
    "afhq": TarFlowConfig(3, 16, 8, 64, 1, 1, num_classes=3),
    "imagenet": TarFlowConfig(3, 6, 2, 64, 1, 2, num_classes=10),
}
DRY_BATCH = 3
CELLS = (  # the most important first
    "afhq:16:guided",
    "afhq:1:guided",
    "imagenet:16:guided",
    "imagenet:1:guided",
    "afhq:128:guided",
    "afhq:16:unguided",
    "afhq:1:unguided",
    "imagenet:16:unguided",
    "imagenet:1:unguided",
    "afhq:16:forward+backward",
    "imagenet:256:unguided",
    "afhq:4:guided",
    "afhq:4:unguided",
    "imagenet:4:guided",
    "imagenet:4:unguided",
    "afhq:16:forward",
    "imagenet:16:forward",
    "imagenet:16:forward+backward",
    "afhq:128:unguided",
)
PASSES = ("guided", "unguided", "forward", "forward+backward")


@dataclass(frozen=True)
class GpuCell(Cell):
    """direction: "inverse", "forward" or "forward+backward". dry: of sizes that an interpreter can do."""

    direction: str = "inverse"
    dry: bool = False

    @classmethod
    def parse(cls, text: str) -> GpuCell:
        """MODEL:BATCH:PASS. Raises ValueError."""
        model, batch, what = (*text.split(":", 2), "", "")[:3]
        if model not in MODELS or what not in PASSES or not batch.isdecimal() or int(batch) < 1:
            raise ValueError(
                f"{text!r} is not MODEL:BATCH:PASS, with MODEL one of {', '.join(MODELS)}; PASS of {', '.join(PASSES)}"
            )
        direction = "inverse" if what.endswith("guided") else what
        return cls(model, int(batch), GUIDANCE if what == "guided" else 0.0, direction)

    def made_dry(self) -> GpuCell:
        return replace(self, batch=min(self.batch, DRY_BATCH), dry=True)

    @property
    def kind(self) -> str:
        return "sampling" if self.direction == "inverse" else "density"

    @property
    def label(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "model": self.config,
            "blocks": "1 of 8",
            "pass": self.direction,
            "batch": self.batch,
            "guidance": self.guidance,
        }

    @property
    def sizes(self) -> TarFlowConfig:
        return (DRY_MODELS if self.dry else MODELS)[self.config]

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
    y: Tensor

    @classmethod
    def of(cls, cell: GpuCell, device: torch.device, seed: int) -> Inputs:
        sizes = cell.sizes
        z = latent_noise(seed, range(cell.batch), sizes.num_patches, sizes.token_dim).to(device)
        return cls(random_model(sizes, seed), z, torch.arange(cell.batch, device=device) % sizes.num_classes)


def _autocast(run: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    def under_autocast(*arguments: Any, **options: Any) -> Tensor:
        with torch.autocast(device.type, dtype=DTYPE):
            return run(*arguments, **options)

    return under_autocast


def _short(sizes: TarFlowConfig) -> TarFlowConfig:
    """The same model on images of 2×2 tokens: a pass has the same kernels and is over at once."""
    height, width = sizes.patch_shape
    return replace(sizes, img_size=(2 * height, 2 * width))


def exact_images(cell: GpuCell, inputs: Inputs, device: torch.device) -> Tensor:
    """In fp32, by the torch backend, for which a block is a second of work even where ml-tarflow takes minutes. That
    this is not the torch backend checking itself is the baseline's part: it has to agree with these images too."""
    sampler = Sampler(inputs.model, backend="torch", device=device, dtype=torch.float32, solver="sequential")
    return sampler.reverse(inputs.z, inputs.y, guidance=cell.guidance)


def samplers(
    cell: GpuCell, inputs: Inputs, published: Published, device: torch.device, *, compiled: bool, cuda: bool
) -> dict[str, Contestant]:
    """The baseline first; compiled, cuda: whether these take part. Each is made when it is called for, and is then a
    function that returns images."""

    def theirs() -> Callable[[], Tensor]:
        def reverse(sizes: TarFlowConfig, model: TarFlow) -> Callable[..., Tensor]:
            run = torch.inference_mode()(published.model(sizes, model.state_dict()).to(device).reverse)
            return functools.partial(_autocast(run, device), y=inputs.y, guidance=cell.guidance)

        short = _short(cell.sizes)
        reverse(short, random_model(short, 0))(inputs.z[:, : short.num_patches])
        return functools.partial(reverse(cell.sizes, inputs.model), inputs.z)

    def ours(backend: str, compile: bool = False) -> Callable[[], Tensor]:
        if compile:
            torch.compiler.reset()  # else the code of earlier cells counts against torch's limit of recompilations
        sampler = Sampler(
            inputs.model, backend=backend, device=device, dtype=DTYPE, solver="sequential", compile=compile
        )
        return functools.partial(sampler.reverse, inputs.z, inputs.y, guidance=cell.guidance)

    found: dict[str, Contestant] = {
        BASELINE: theirs,
        TORCH: functools.partial(ours, "torch"),
        TRITON: functools.partial(ours, BACKEND),
    }
    if compiled:
        found[COMPILED] = functools.partial(ours, "torch", compile=True)
    if cuda:  # last: a kernel that goes wrong can leave a process without a GPU
        found[CUDA] = functools.partial(ours, "cuda")
    return found


def density_pass(model: Any, images: Tensor, y: Tensor, *, backward: bool) -> Tensor:
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
    cell: GpuCell, inputs: Inputs, published: Published, device: torch.device
) -> tuple[Contestant, dict[str, Contestant]]:
    """The exact result, of our model in fp32, and the contestants: theirs under autocast, ours with bf16 weights."""
    images = inputs.model.unpatchify(inputs.z)
    loss = functools.partial(density_pass, images=images, y=inputs.y, backward=cell.direction != "forward")

    def ours(dtype: torch.dtype) -> Callable[[], Tensor]:
        model = random_model(cell.sizes, 0)
        model.load_state_dict(inputs.model.state_dict())
        return functools.partial(loss, model.to(device, dtype))

    def theirs() -> Callable[[], Tensor]:
        model = published.model(cell.sizes, inputs.model.state_dict()).to(device)
        return functools.partial(_autocast(loss, device), model)

    return functools.partial(ours, torch.float32), {BASELINE: theirs, DENSITY: functools.partial(ours, DTYPE)}
