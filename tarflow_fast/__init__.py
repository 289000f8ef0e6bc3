"""A fast, drop-in sampler for TarFlow, the transformer autoregressive flow (arXiv 2412.06329).

Names are imported at first use, so that `import tarflow_fast`, and the command line's --help, do not wait for
torch. No module here may bear the name of a public function: importing it would put the module in its place.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .card import model_card
    from .checkpoint import load, load_pretrained, save
    from .config import TarFlowConfig
    from .data import ImageData, load_images
    from .denoising import denoise
    from .engine import backends
    from .errors import (
        ArgumentError,
        BackendError,
        CheckpointError,
        DataError,
        NonFiniteError,
        OutOfMemoryError,
        TarFlowError,
        TarFlowWarning,
    )
    from .evaluate import bayes_accuracy, bits_per_dim
    from .hub import push_to_hub
    from .images import save_grid
    from .model import TarFlow, dequantize
    from .report import Report, Samples
    from .sampler import Sampler, accelerate
    from .solvers import SolverPlan
    from .trainer import TrainConfig, train

    __version__: str

_HOME = {
    "TarFlow": "model",
    "TarFlowConfig": "config",
    "dequantize": "model",
    "load": "checkpoint",
    "save": "checkpoint",
    "load_pretrained": "checkpoint",
    "model_card": "card",
    "push_to_hub": "hub",
    "Sampler": "sampler",
    "Samples": "report",
    "SolverPlan": "solvers",
    "Report": "report",
    "accelerate": "sampler",
    "denoise": "denoising",
    "ImageData": "data",
    "load_images": "data",
    "bits_per_dim": "evaluate",
    "bayes_accuracy": "evaluate",
    "save_grid": "images",
    "backends": "engine",
    "TrainConfig": "trainer",
    "train": "trainer",
    "TarFlowError": "errors",
    "TarFlowWarning": "errors",
    "ArgumentError": "errors",
    "BackendError": "errors",
    "CheckpointError": "errors",
    "DataError": "errors",
    "NonFiniteError": "errors",
    "OutOfMemoryError": "errors",
}

__all__ = [
    "ArgumentError",
    "BackendError",
    "CheckpointError",
    "DataError",
    "ImageData",
    "NonFiniteError",
    "OutOfMemoryError",
    "Report",
    "Sampler",
    "Samples",
    "SolverPlan",
    "TarFlow",
    "TarFlowConfig",
    "TarFlowError",
    "TarFlowWarning",
    "TrainConfig",
    "__version__",
    "accelerate",
    "backends",
    "bayes_accuracy",
    "bits_per_dim",
    "denoise",
    "dequantize",
    "load",
    "load_images",
    "load_pretrained",
    "model_card",
    "push_to_hub",
    "save",
    "save_grid",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("tarflow_fast")
    elif name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
