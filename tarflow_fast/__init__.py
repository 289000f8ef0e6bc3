"""tarflow_fast is a fast, drop-in sampler for TarFlow, the transformer autoregressive flow (arXiv 2412.06329).

`tarflow_fast.flows` has the other families of flows. Names are imported at first use, so that `import tarflow_fast`,
and the command line's --help, do not wait for torch. No module here may bear the name of a public function: importing
it would put the module in its place.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import flows as flows
    from .adapters import accelerate
    from .backend import backends
    from .checkpoints import load, load_pretrained, model_card, push_to_hub, save
    from .data import ImageData, load_images
    from .errors import (
        ArgumentError,
        BackendError,
        CheckpointError,
        DataError,
        DeviceFault,
        NonFiniteError,
        OutOfMemoryError,
        TarFlowError,
        TarFlowWarning,
    )
    from .evaluation import bayes_accuracy, bits_per_dim
    from .images import save_grid
    from .models import TarFlow, TarFlowConfig, denoise, dequantize
    from .sampling import Report, Sampler, Samples
    from .solvers import SolverPlan
    from .trainer import TrainConfig, train

    __version__: str

_HOME = {
    "TarFlow": "models",
    "TarFlowConfig": "models",
    "dequantize": "models",
    "load": "checkpoints",
    "save": "checkpoints",
    "load_pretrained": "checkpoints",
    "model_card": "checkpoints",
    "push_to_hub": "checkpoints",
    "Sampler": "sampling",
    "Samples": "sampling",
    "SolverPlan": "solvers",
    "Report": "sampling",
    "accelerate": "adapters",
    "denoise": "models",
    "ImageData": "data",
    "load_images": "data",
    "bits_per_dim": "evaluation",
    "bayes_accuracy": "evaluation",
    "save_grid": "images",
    "backends": "backend",
    "TrainConfig": "trainer",
    "train": "trainer",
    "TarFlowError": "errors",
    "TarFlowWarning": "errors",
    "ArgumentError": "errors",
    "BackendError": "errors",
    "CheckpointError": "errors",
    "DataError": "errors",
    "DeviceFault": "errors",
    "NonFiniteError": "errors",
    "OutOfMemoryError": "errors",
}

__all__ = [
    "ArgumentError",
    "BackendError",
    "CheckpointError",
    "DataError",
    "DeviceFault",
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
    elif name == "flows":
        value = importlib.import_module(".flows", __name__)
    elif name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
