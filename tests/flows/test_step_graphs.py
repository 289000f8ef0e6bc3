"""Functions as CUDA graphs: the same results, for every shape and every set of weights, and nothing kept in a copy."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from tarflow_fast.flows.step_graphs import MOST, StepGraphs

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_elsewhere_the_function_itself_runs() -> None:
    graphs, model = StepGraphs(), nn.Linear(2, 2)
    x = torch.randn(3, 2)
    assert torch.equal(graphs.run("key", model, (x,), model), model(x))
    assert not graphs._graphs


def test_a_copy_is_empty() -> None:
    graphs = StepGraphs()
    graphs._graphs["key"] = (None, (), torch.zeros(1))  # type: ignore[assignment]
    for copied in (copy.deepcopy(graphs), pickle.loads(pickle.dumps(graphs))):
        assert isinstance(copied, StepGraphs)
        assert not copied._graphs


@on_gpu
@torch.no_grad()
def test_a_graph_gives_what_the_function_gives() -> None:
    graphs, model = StepGraphs(), nn.Linear(4, 4, device="cuda")

    def function(x: Tensor, y: Tensor) -> Tensor:
        return model(x).relu() + y

    for rows in (3, 3, 5, 7, 9, 11, 3):
        x, y = torch.randn(2, rows, 4, device="cuda").unbind()
        assert torch.equal(graphs.run("key", function, (x, y), model), function(x, y))
        assert len(graphs._graphs) <= MOST
    model.weight.mul_(2)  # in place, where the graph reads
    assert torch.equal(graphs.run("key", function, (x, y), model), function(x, y))
    model.weight = nn.Parameter(torch.randn(4, 4, device="cuda"))
    assert torch.equal(graphs.run("key", function, (x, y), model), function(x, y))
