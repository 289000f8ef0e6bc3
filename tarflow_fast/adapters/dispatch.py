"""This module chooses the adapter of a model by the library that its class comes from."""

from __future__ import annotations

from importlib import import_module
from typing import Any

LIBRARIES = {"zuko": ".zuko", "nflows": ".nflows", "normflows": ".normflows", "sbi": ".sbi"}
"""The modules of this package by the libraries whose flows they take; all others are taken for ml-tarflow's."""


def accelerate(model: Any, *, check: bool = True, **options: Any) -> Any:
    """Returns a fast counterpart of another library's model, with that model's own method names and results.

    The model is read, not changed, and its weights are copied.

    Args:
        model: A module with ml-tarflow's state dict, of which a `Sampler` is made, with the same `.reverse`; or a flow
            of zuko (`zuko.lazy.Flow`), nflows (`nflows.flows.Flow`) or normflows (`NormalizingFlow`), or a posterior of
            sbi (`DirectPosterior`), whose counterpart is used as the flow is: `fast(c).sample((n,))` for zuko,
            `fast.sample(n, c)` for nflows. It takes new weights with `fast.refresh()`.
        check: Whether small passes of both are compared.
        **options: The keyword arguments of `Sampler`; for a flow those of `FlowInverse`.

    Returns:
        The fast counterpart.

    Raises:
        ArgumentError: The model has a part that no engine knows, which the error names; `check` found that it computes
            another thing; or an option is wrong.
        BackendError: The backend that was asked for cannot serve.
        CheckpointError: The state dict of an ml-tarflow module is not that of a whole, finite TarFlow.
    """
    origins = (kind.__module__.partition(".")[0] for kind in type(model).__mro__)
    library = next((LIBRARIES[origin] for origin in origins if origin in LIBRARIES), ".ml_tarflow")
    return import_module(library, __package__).accelerate(model, check=check, **options)
