"""The state of a run between two steps, and its file."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from ..errors import ArgumentError, CheckpointError
from ..model import TarFlow
from .config import FREE_ON_RESUME, TrainConfig

FORMAT = 1
SUMS = ("loss", "half_z2", "log_det", "grad_norm")  # summed over the steps since the last row of metrics


def ema_decay(limit: float, s: int) -> float:
    """Decay of the update after s others: (1 + s)/(10 + s), to forget the start soon, up to the limit."""
    return min(limit, (1 + s) / (10 + s))


class TrainState:
    """Model, moving average, optimiser, number of steps done, and the sums of the unfinished row of metrics.

    There is no state of a random generator: whatever is random is a function of (seed, step), see `Batches`.
    """

    def __init__(self, model: TarFlow, config: TrainConfig):
        def average(means: Any, values: Any, _: Tensor | int) -> None:
            torch._foreach_lerp_(means, values, 1 - ema_decay(config.ema_decay, self.step))

        self.model = model
        self.ema = AveragedModel(model, multi_avg_fn=average)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True
        )
        self.step = 0
        self.seconds = 0.0
        self.sums = torch.zeros(len(SUMS), dtype=torch.float32, device=model.device)
        self.summed = 0

    @property
    def average(self) -> TarFlow:
        """The model that is evaluated and saved."""
        module = self.ema.module
        assert isinstance(module, TarFlow)
        return module

    def save(self, path: Path, config: TrainConfig, fingerprint: int) -> None:
        """Writes all of it; the file appears whole or not at all."""
        content = {
            "format": FORMAT,
            "config": config.to_dict(),
            "fingerprint": fingerprint,
            "model": self.model.state_dict(),
            "ema": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "sums": self.sums,
            "summed": self.summed,
        }
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)

    def restore(self, path: Path, config: TrainConfig, fingerprint: int) -> None:
        """Takes over what `save` wrote. CheckpointError: a broken file; ArgumentError: another run's."""
        try:
            content = torch.load(path, map_location=self.sums.device, weights_only=True)
        except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{path}: not a whole training checkpoint ({error})") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise CheckpointError(f"{path}: not a training checkpoint of format {FORMAT}")
        for name, value in config.to_dict().items():
            before = content["config"].get(name)
            if name not in FREE_ON_RESUME and before != value:
                raise ArgumentError(name, f"{before!r}, as in the run to be continued", repr(value))
        if content["fingerprint"] != fingerprint:
            raise ArgumentError("data", "the images of the run to be continued", "others")
        self.model.load_state_dict(content["model"])
        self.average.load_state_dict(content["ema"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.step, self.seconds = content["step"], content["seconds"]
        self.ema.n_averaged.fill_(self.step)
        self.sums.copy_(content["sums"])
        self.summed = content["summed"]
