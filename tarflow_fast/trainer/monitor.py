"""Training watches the log-det of each layer, and tells where one leaps."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TarFlowWarning
from ..flows import Bijection

MEMORY = 0.95  # how much of the running mean and deviation is kept at each step
SETTLED = 100  # steps before which leaps are not told
LEAP = 20.0  # how many usual deviations a log-det has to leap, to be told
LEAST_LEAP = 1.0  # and how many nats for each value of a sample


class LayerMonitor:
    """A `LayerMonitor` keeps the mean log-det of each `Bijection` of a model that is made of no others.

    model: the model, whose layers get hooks. dims: the number of values in a sample.
    """

    def __init__(self, model: nn.Module, dims: int):
        self.dims = dims
        self.names: list[str] = []
        self._now: dict[str, Tensor] = {}
        self._steps = 0
        self._mean, self._deviation, self._leap = (torch.zeros(0, device="cpu") for _ in range(3))
        for name, module in model.named_modules():
            others = (m for m in module.modules() if m is not module)
            if isinstance(module, Bijection) and not any(isinstance(m, Bijection) for m in others):
                module.register_forward_hook(self._seeing(name))
                self.names.append(name)

    def _seeing(self, name: str) -> Any:
        def see(module: nn.Module, _: Any, out: Any) -> None:
            if module.training and isinstance(out, tuple) and not torch.compiler.is_compiling():
                self._now[name] = out[1].detach()

        return see

    def step(self) -> None:
        """Takes in what the layers gave in a step."""
        if not self._now:
            return
        self.names = [name for name in self.names if name in self._now]
        now = torch.stack([self._now[name].float().mean() for name in self.names]) / self.dims
        if self._mean.shape != now.shape:
            self._mean, self._deviation, self._leap = now.clone(), torch.zeros_like(now), torch.zeros_like(now)
        away = (now - self._mean).abs()
        if self._steps >= SETTLED:
            leaps = (away > LEAP * self._deviation) & (away > LEAST_LEAP)
            self._leap = torch.maximum(self._leap, torch.where(leaps, away, 0.0))
        self._mean.lerp_(now, 1 - MEMORY)
        self._deviation.lerp_(away, 1 - MEMORY)
        self._steps += 1

    def row(self) -> dict[str, float]:
        """Returns the running mean log-det of each layer, in nats per value. Warns of leaps since the last row."""
        leaps = zip(self.names, self._leap.tolist(), strict=False)
        told = ", ".join(f"{name} by {leap:.3g}" for name, leap in leaps if leap > 0)
        if told:
            warnings.warn(f"log-det leapt, in nats per value: {told}; lower lr", TarFlowWarning, stacklevel=2)
            self._leap.zero_()
        return dict(zip(self.names, self._mean.tolist(), strict=False))
