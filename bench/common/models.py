"""The models that suites measure, with random weights, what goes into them, and how they are run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tarflow_fast import Sampler, TarFlow, TarFlowConfig
from tarflow_fast.sampling.noise import latent_noise

from .machine import CPU
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
ONE_BLOCK = {name: replace(MODELS[name], num_blocks=1) for name in ("afhq", "imagenet")}  # their blocks are alike
DRY = {  # stand-ins for the large ones, of sizes that an interpreter can do
    "afhq": TarFlowConfig(3, 16, 8, 64, 1, 1, num_classes=3),
    "imagenet": TarFlowConfig(3, 6, 2, 64, 1, 2, num_classes=10),
}
COMPILED = "torch compiled"


def random_model(config: TarFlowConfig, seed: int) -> TarFlow:
    """Returns a model with random weights whose inverse behaves like a trained model's: log-scales xa of one or two
    tenths, no overflow. Embeddings and the output layer, which the constructor leaves at or near zero, are drawn with a
    standard deviation of 0.2, of 0.2/√C for the output layer's matrix."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TarFlow.from_config(config)
        for name, value in model.named_parameters():
            if name.endswith(("pos_embed", "class_embed")):
                torch.nn.init.normal_(value, std=0.2)
            elif name.endswith("proj_out.weight"):
                torch.nn.init.normal_(value, std=0.2 * config.channels**-0.5)
    return model.eval()


def inputs(
    config: TarFlowConfig, batch: int, seed: int, device: torch.device = CPU, none: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Returns (B, T, D) noise, what `Sampler.sample` draws, and (B,) labels that go round the classes, with `none`
    round "no class" too; None if there are no classes."""
    z = latent_noise(seed, range(batch), config.num_patches, config.token_dim).to(device)
    if not config.num_classes:
        return z, None
    y = torch.arange(batch, device=device) % (config.num_classes + none)
    return z, y.masked_fill(y == config.num_classes, -1)


def samplers(
    baseline: str,
    theirs: MlTarflow | None,
    ours: Mapping[str, str],
    model: TarFlow,
    inputs: tuple[Any, ...],
    device: torch.device,
    dtype: torch.dtype,
    *,
    their_dtype: torch.dtype = torch.float32,
) -> dict[str, Callable[[], Callable[[], Tensor]]]:
    """Returns the candidates that draw one batch: the published reverse under autocast to their_dtype, and our
    sequential samplers. ours: names and backends. inputs: latents, labels and guidance."""

    def make(name: str) -> Callable[[], Tensor]:
        if name == baseline and theirs is not None:
            return functools.partial(theirs.reverse(model, device, their_dtype), *inputs)
        if name == COMPILED:
            torch.compiler.reset()  # else the code of earlier cells counts against torch's limit of recompilations
        how: dict[str, Any] = {"backend": ours[name], "device": device, "dtype": dtype, "compile": name == COMPILED}
        return functools.partial(Sampler(model, solver="sequential", **how).reverse, *inputs)

    return {name: functools.partial(make, name) for name in (baseline, *ours)}
