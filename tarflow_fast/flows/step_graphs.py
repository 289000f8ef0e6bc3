"""Functions that run as one CUDA graph on a GPU, such as all the fixed steps of an ODE."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

MOST = 4  # graphs that are kept, as each has memory of its own


class StepGraphs:
    """A cache of CUDA graphs, each of one function for inputs of one shape.

    A launch of a small network's layer takes longer than the layer; a graph launches all layers of all steps at once.
    A copy or a pickle of the cache is empty, as graphs belong to their process.
    """

    def __init__(self) -> None:
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]] = {}

    def run(
        self, key: Hashable, function: Callable[..., Tensor], inputs: tuple[Tensor, ...], model: nn.Module
    ) -> Tensor:
        """Returns function(*inputs), from a graph on a GPU and from the function itself elsewhere.

        key: what the function depends on beside its inputs and the weights. inputs: (B, …) tensors. model: whose
        weights the function reads; where they move to other addresses, a new graph is made.
        """
        if inputs[0].device.type != "cuda":
            return function(*inputs)
        places = tuple(p.data_ptr() for p in model.parameters())
        full = (key, places, tuple((tuple(x.shape), x.dtype, x.device) for x in inputs))
        if full not in self._graphs:
            while len(self._graphs) >= MOST:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[full] = _capture(function, inputs)
        graph, held, result = self._graphs[full]
        for target, x in zip(held, inputs, strict=True):
            target.copy_(x)
        graph.replay()
        return result.clone()

    def __deepcopy__(self, memo: dict[int, Any]) -> StepGraphs:
        return StepGraphs()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return StepGraphs, ()


def _capture(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...]
) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]:
    """Returns a graph of function(*held), the tensors `held` that it reads, and the one that it writes."""
    held = tuple(x.clone() for x in inputs)
    side = torch.cuda.Stream(inputs[0].device)
    side.wait_stream(torch.cuda.current_stream(inputs[0].device))
    with torch.cuda.stream(side):
        function(*held)  # libraries allocate their workspaces at the first call, which a capture forbids
    torch.cuda.current_stream(inputs[0].device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        result = function(*held)
    return graph, held, result
