"""The models that suites measure, with random weights, what goes into them, and how they are run."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tarflow_fast import Sampler, TarFlow, TarFlowConfig, denoise
from tarflow_fast.sampling.noise import latent_noise

from .ml_tarflow import MlTarflow

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
SANITIZED = {  # for tools that watch every access to memory: T = 16, and the width of a large model with T = 4
    "small": TarFlowConfig(1, 8, 2, 64, 1, 2, num_classes=3),
    "wide": replace(MODELS["afhq"], img_size=16, num_blocks=1, layers_per_block=1),
}
SHIPPED = "fashion_mnist"
DENSITIES = ("auto", "cpu", "torch")  # backends of the density pass and of its gradient
COMPILED = "torch compiled"


def one_block(config: TarFlowConfig) -> TarFlowConfig:
    """Returns the same model with one of its flow blocks, which are alike."""
    return replace(config, num_blocks=1)


def random_model(config: TarFlowConfig, seed: int) -> TarFlow:
    """Returns a model with random weights whose inverse behaves like a trained model's: log-scales xa of one or two
    tenths, no overflow.

    They are those of the constructor, except that embeddings and the output layer, which start at or near zero there,
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
    """Returns (B, T, D) noise, what `Sampler.sample` draws."""
    return latent_noise(seed, range(batch), config.num_patches, config.token_dim).to(device)


def labels(config: TarFlowConfig, batch: int, device: torch.device | str = "cpu", none: bool = False) -> Tensor | None:
    """Returns (B,) labels that go round the classes, and with `none` round "no class" too; or None if there are no
    classes."""
    if not config.num_classes:
        return None
    y = torch.arange(batch, device=device) % (config.num_classes + none)
    return y.masked_fill(y == config.num_classes, -1)


def inputs(
    config: TarFlowConfig, batch: int, seed: int, device: torch.device | str = "cpu", none: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Returns what `latents` and `labels` return."""
    return latents(config, batch, seed, device), labels(config, batch, device, none)


def samplers(
    baseline: str,
    theirs: MlTarflow,
    ours: Mapping[str, str],
    model: TarFlow,
    inputs: tuple[Tensor, Tensor | None, float],
    *,
    device: torch.device,
    dtype: torch.dtype,
    their_dtype: torch.dtype = torch.float32,
) -> dict[str, Callable[[], Callable[[], Tensor]]]:
    """Returns the candidates that draw one batch: the published reverse, and our sequential samplers.

    baseline: the name of the published one. ours: the name of each of ours, and its backend. inputs: the latents, the
    labels and the guidance. their_dtype: of the published one, under autocast.
    """

    def make(name: str) -> Callable[[], Tensor]:
        if name == baseline:
            return functools.partial(theirs.reverse(model, device, their_dtype), *inputs)
        if name == COMPILED:
            torch.compiler.reset()  # else the code of earlier cells counts against torch's limit of recompilations
        how: dict[str, Any] = {"backend": ours[name], "device": device, "dtype": dtype, "compile": name == COMPILED}
        return functools.partial(Sampler(model, solver="sequential", **how).reverse, *inputs)

    return {name: functools.partial(make, name) for name in (baseline, *ours)}


def with_density(model: TarFlow, backend: str, threads: int) -> TarFlow:
    """Returns a copy of the model whose density pass is this backend's. The caller sets torch's threads."""
    return copy.deepcopy(model).set_density(backend, None if backend == "torch" else threads)


def denoised(model: TarFlow, images: Tensor, y: Tensor | None, *, backend: str, threads: int, **how: Any) -> Tensor:
    """Returns `tarflow_fast.denoise` of the images by this backend. The caller sets torch's threads."""
    return denoise(model, images, y, backend=backend, threads=None if backend == "torch" else threads, **how)
