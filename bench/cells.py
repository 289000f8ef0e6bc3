"""The models that suites measure, and the cells they measure them in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tarflow_fast import TarFlow, TarFlowConfig

from .roofline import Work, inverse_work


@dataclass(frozen=True)
class Config:
    """sizes of the model, and the batches and guidance scales that it is timed at."""

    sizes: TarFlowConfig
    batches: tuple[int, ...]
    guidance: tuple[float, ...]


CONFIGS = {
    "medium": Config(TarFlowConfig(3, 32, 2, 256, 4, 4), (1, 64), (0.0,)),
    "small": Config(TarFlowConfig(1, 28, 4, 128, 4, 4, num_classes=10), (1, 16, 64), (0.0, 2.0)),
    "tiny": Config(TarFlowConfig(1, 8, 2, 64, 2, 1, num_classes=3), (2,), (0.0, 2.0)),
}
DEFAULT_CONFIGS = ("medium", "small")


@dataclass(frozen=True)
class Cell:
    config: str
    batch: int
    guidance: float

    @property
    def label(self) -> dict[str, Any]:
        return {"model": self.config, "batch": self.batch, "guidance": self.guidance}

    @property
    def sizes(self) -> TarFlowConfig:
        return CONFIGS[self.config].sizes

    @property
    def work(self) -> Work:
        return inverse_work(self.sizes, self.batch, guided=self.guidance > 0)


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


def choose_cells(configs: Sequence[str], batches: Sequence[int] = ()) -> list[Cell]:
    """Every cell of these configurations, each once. batches: instead of a configuration's own."""
    return [
        Cell(name, batch, guidance)
        for name in dict.fromkeys(configs)
        for guidance in CONFIGS[name].guidance
        for batch in dict.fromkeys(batches or CONFIGS[name].batches)
    ]
