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
from torch import Tensor

from tarflow_fast import TarFlow, TarFlowConfig

FILE = "transformer_flow.py"


@dataclass(frozen=True)
class MlTarflow:
    """module is its transformer_flow.py, imported; sha256 is that file's, which tells what version was measured."""

    module: ModuleType
    sha256: str

    @classmethod
    def load(cls, checkout: Path | None) -> MlTarflow:
        """Imports `checkout`/transformer_flow.py. Raises click.UsageError if that is not ml-tarflow's."""

        def refused(why: str) -> click.BadParameter:
            return click.BadParameter(why, param_hint="'--ml-tarflow'")

        if checkout is None:
            raise click.UsageError("Missing option '--ml-tarflow'.")
        path, name = checkout / FILE, "ml_tarflow_transformer_flow"
        if not path.is_file():
            raise refused(f"not a checkout of ml-tarflow: there is no {FILE} in it")
        spec: Any = importlib.util.spec_from_file_location(name, path)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
        try:
            spec.loader.exec_module(module)
            _ = module.Model.reverse
        except Exception as error:  # someone else's code: whatever it raises is the message
            said = f"its {FILE} cannot be imported, or has no class Model with a reverse: {error!r}"
            raise refused(said) from error
        return cls(module, hashlib.sha256(path.read_bytes()).hexdigest())

    def model(self, config: TarFlowConfig, weights: dict[str, Tensor]) -> Any:
        """Returns its Model of these sizes with these weights, in eval mode. Its heads always have 64 channels."""
        model = self.module.Model(**{name: size for name, size in config.to_dict().items() if name != "head_dim"})
        model.load_state_dict(weights)
        return model.eval()

    def reverse(self, model: TarFlow, device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
        """Returns its reverse with our model's weights, under inference_mode as its own scripts run it."""
        theirs = self.model(model.config, model.state_dict()).to(device)
        return torch.inference_mode()(autocast(theirs.reverse, device, dtype))


def autocast(run: Callable[..., Tensor], device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Returns the function under autocast to a half precision, or as it is in fp32."""
    under: Any = (lambda run: run) if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)
    return under(run)
