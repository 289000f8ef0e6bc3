"""Functions that run as one CUDA graph on a GPU, such as all the fixed steps of an ODE."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TarFlowWarning, first_line

Captured = tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]  # the graph, what it reads, and what it writes

MOST = 4  # graphs that are kept, as each has memory of its own


class StepGraphs:
    """A cache of CUDA graphs, each of one function for inputs of one shape.

    A launch of a small network's layer takes longer than the layer; a graph launches all layers of all steps at once.
    What that saves has not been measured on a GPU yet.
    A copy or a pickle of the cache is empty, as graphs belong to their process.
    """

    def __init__(self) -> None:
        self._graphs: dict[Hashable, Captured | None] = {}

    def run(
        self, key: Hashable, function: Callable[..., Tensor], inputs: tuple[Tensor, ...], model: nn.Module
    ) -> Tensor:
        """Returns function(*inputs), from a graph on a GPU and from the function itself elsewhere.

        Where it cannot be captured, a warning says so once, and the function itself runs from then on.

        key: what the function depends on beside its inputs and the weights. inputs: (B, …) tensors. model: whose
        weights the function reads; where they move to other addresses, a new graph is made.
        """
        if not capturable(inputs[0]):
            return function(*inputs)
        places = tuple(p.data_ptr() for p in model.parameters())
        full = (key, places, tuple((tuple(x.shape), x.dtype, x.device) for x in inputs))
        if full not in self._graphs:
            while len(self._graphs) >= MOST:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[full] = _captured(function, inputs)
        found = self._graphs[full]
        if found is None:
            return function(*inputs)
        graph, held, result = found
        for target, x in zip(held, inputs, strict=True):
            target.copy_(x)
        graph.replay()
        return result.clone()

    def __deepcopy__(self, memo: dict[int, Any]) -> StepGraphs:
        return StepGraphs()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return StepGraphs, ()


def capturable(x: Tensor) -> bool:
    """Returns whether functions of this tensor run as graphs: on CUDA devices."""
    return x.device.type == "cuda"


def _captured(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Captured | None:
    """Returns a graph of function(*held), the tensors `held` that it reads, and the one that it writes.

    Returns None, with a warning, where the driver or an operation refuses.
    """
    held = tuple(x.clone() for x in inputs)
    try:
        graph, result = record(function, held)
    except RuntimeError as error:
        warnings.warn(f"steps of an ODE run without a CUDA graph: {first_line(error)}", TarFlowWarning, stacklevel=4)
        return None
    return graph, held, result


def record(function: Callable[..., Tensor], held: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Returns a CUDA graph of function(*held), and the tensor that it writes. Other threads may use the device."""
    device = held[0].device
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        function(*held)  # libraries allocate their workspaces at the first call, which a capture forbids
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        result = function(*held)
    return graph, result
