"""The published model, imported from a checkout of ml-tarflow that lies outside this repository."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import torch
from torch import Tensor, nn

from tarflow_fast import TarFlow, TarFlowConfig

FILE = "transformer_flow.py"
_OPTION = "'--ml-tarflow'"


@dataclass(frozen=True)
class MlTarflow:
    """module is its transformer_flow.py, imported; sha256 is that file's, which tells what version was measured."""

    module: ModuleType
    sha256: str

    @classmethod
    def load(cls, checkout: Path) -> MlTarflow:
        """Import `checkout`/transformer_flow.py. Raises click.BadParameter if that is not ml-tarflow's."""
        path = checkout / FILE
        if not path.is_file():
            raise click.BadParameter(f"not a checkout of ml-tarflow: there is no {FILE} in it", param_hint=_OPTION)
        spec = importlib.util.spec_from_file_location("ml_tarflow_transformer_flow", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where dataclasses and the like look their module up
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # someone else's code: whatever it raises is the message
            raise click.BadParameter(f"its {FILE} cannot be imported: {error!r}", param_hint=_OPTION) from error
        if not callable(getattr(getattr(module, "Model", None), "reverse", None)):
            message = f"not a checkout of ml-tarflow: its {FILE} has no class Model with a reverse"
            raise click.BadParameter(message, param_hint=_OPTION)
        return cls(module, hashlib.sha256(path.read_bytes()).hexdigest())

    def model(self, config: TarFlowConfig, weights: dict[str, Tensor]) -> Any:
        """Its Model of these sizes with these weights, in eval mode. Its heads always have 64 channels."""
        sizes = config.to_dict()
        if sizes.pop("head_dim") != 64:
            raise ValueError("the published model has heads of 64 channels only")
        model: nn.Module = self.module.Model(**sizes)
        model.load_state_dict(weights)
        return model.eval()

    def reverse(self, model: TarFlow, device: torch.device) -> Callable[..., Tensor]:
        """Its reverse with our model's weights, under inference_mode as its own scripts run it."""
        theirs = self.model(model.config, model.state_dict()).to(device)
        reverse: Callable[..., Tensor] = torch.inference_mode()(theirs.reverse)
        return reverse
