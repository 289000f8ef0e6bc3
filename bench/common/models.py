"""The models that suites measure, with random weights, what goes into them, and their density pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tarflow_fast import Sampler, TarFlow, TarFlowConfig, denoise
from tarflow_fast.sampling.noise import latent_noise

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MODELS = {
    "small": TarFlowConfig(1, 28, 4, 128, 4, 4, num_classes=10),
    "medium": TarFlowConfig(3, 32, 2, 256, 4, 4),
    "afhq": TarFlowConfig(3, 256, 8, 768, 8, 8, num_classes=3),
    "imagenet": TarFlowConfig(3, 64, 2, 768, 8, 8, num_classes=1000),
    "wide heads": TarFlowConfig(3, 32, 4, 256, 4, 4, head_dim=128),
    "volume-preserving": TarFlowConfig(3, 32, 4, 96, 4, 4, head_dim=32, nvp=False),
    "tiny": TarFlowConfig(1, 8, 2, 64, 2, 1, num_classes=3),  # to try a suite itself, in seconds
}
DRY_MODELS = {  # stand-ins for the large ones, of sizes that an interpreter can do
    "afhq": TarFlowConfig(3, 16, 8, 64, 1, 1, num_classes=3),
    "imagenet": TarFlowConfig(3, 6, 2, 64, 1, 2, num_classes=10),
}
SHIPPED = "fashion_mnist"
DENSITIES = ("auto", "cpu", "torch")  # backends of the density pass and of its gradient


def one_block(config: TarFlowConfig) -> TarFlowConfig:
    """The same model with one of its flow blocks, which are alike."""
    return replace(config, num_blocks=1)


SANITIZED = {  # for tools that watch every access to memory
    "small": TarFlowConfig(1, 8, 2, 64, 1, 2, num_classes=3),  # T = 16
    "wide": replace(one_block(MODELS["afhq"]), img_size=16, layers_per_block=1),  # T = 4, of the real width
}


def random_model(config: TarFlowConfig, seed: int) -> TarFlow:
    """Random weights whose inverse behaves like a trained model's: log-scales xa of one or two tenths, no overflow.

    The constructor's initialisation, except that embeddings and the output layer, which start at or near zero there,
    are drawn with a standard deviation of 0.2 (of 0.2/√C for the output layer's matrix).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TarFlow.from_config(config)
        for name, value in model.named_parameters():
            if name.endswith(("pos_embed", "class_embed")):
                torch.nn.init.normal_(value, std=0.2)
            elif name.endswith("proj_out.weight"):
                torch.nn.init.normal_(value, std=0.2 * config.channels**-0.5)
    return model.eval()


def latents(config: TarFlowConfig, batch: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """(B, T, D) noise, what `Sampler.sample` draws."""
    return latent_noise(seed, range(batch), config.num_patches, config.token_dim).to(device)


def labels(config: TarFlowConfig, batch: int, device: torch.device | str = "cpu", none: bool = False) -> Tensor | None:
    """(B,) labels that go round the classes, and with `none` round "no class" too; None for a model without classes."""
    if not config.num_classes:
        return None
    y = torch.arange(batch, device=device) % (config.num_classes + none)
    return y.masked_fill(y == config.num_classes, -1)


def sequential_reverse(model: TarFlow, *, compile: bool = False, **options: Any) -> Callable[..., Tensor]:
    """The reverse of a sequential sampler. options: its others."""
    if compile:
        torch.compiler.reset()  # else the code of earlier cells counts against torch's limit of recompilations
    return Sampler(model, solver="sequential", compile=compile, **options).reverse


def with_density(model: TarFlow, backend: str, threads: int) -> TarFlow:
    """A copy of the model whose density pass is this backend's. The caller sets torch's threads."""
    return copy.deepcopy(model).set_density(backend, None if backend == "torch" else threads)


def denoised(model: TarFlow, images: Tensor, y: Tensor | None, *, backend: str, threads: int, **how: Any) -> Tensor:
    """What `tarflow_fast.denoise` returns by this backend. how: its other options. The caller sets torch's threads."""
    return denoise(model, images, y, backend=backend, threads=None if backend == "torch" else threads, **how)
