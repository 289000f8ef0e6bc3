"""Functions as CUDA graphs: the same results, for every shape and every set of weights, and nothing kept in a copy."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from family_cases import CASES, FamilyCase
from torch import Tensor, nn

from tarflow_fast.errors import ODEDiverged, TarFlowWarning
from tarflow_fast.flows import build, step_graphs
from tarflow_fast.flows.ode import ODE
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


class StandIn:
    """A graph where there is no GPU: a replay does again what was captured, from and to the tensors of the capture."""

    captures = 0

    def __init__(self, function: Callable[..., Tensor], held: tuple[Tensor, ...]):
        self.function, self.held, self.result = function, held, function(*held)
        StandIn.captures += 1

    def replay(self) -> None:
        self.result.copy_(self.function(*self.held))


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are made from now on, by `StandIn`."""

    def record(function: Callable[..., Tensor], held: tuple[Tensor, ...]) -> tuple[StandIn, Tensor]:
        graph = StandIn(function, held)
        return graph, graph.result

    monkeypatch.setattr(StandIn, "captures", 0)
    monkeypatch.setattr(step_graphs, "capturable", lambda x: True)
    monkeypatch.setattr(step_graphs, "record", record)


ODES = [case for case in CASES if hasattr(case.model(), "solve")]


@pytest.mark.parametrize("case", ODES, ids=str)
def test_all_steps_of_an_ode_are_one_graph(case: FamilyCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is captured once for a shape, reads the noise and the classes of each batch, and tells what it evaluates."""
    model, y, ode = case.model(), case.labels(5), ODE("midpoint", 3)
    monkeypatch.setattr(step_graphs, "record", lambda *_: pytest.fail("a graph was captured on a CPU"))
    labels = [y, None if y is None else 1 - y]
    wanted = [model.sample(5, labels[seed], generator=torch.Generator().manual_seed(seed), ode=ode) for seed in (0, 1)]
    stand_in(monkeypatch)
    calls: list[object] = []
    model.velocity.register_forward_hook(lambda *given: calls.append(given))
    for seed in (0, 1):
        x = model.sample(5, labels[seed], generator=torch.Generator().manual_seed(seed), ode=ode)
        assert torch.equal(x, wanted[seed])
        assert model.evaluations() == 6
    assert (StandIn.captures, len(calls)) == (1, 3 * 6)  # one capture and two replays, of six evaluations each
    model.sample(4, None if y is None else y[:4], ode=ode)
    assert StandIn.captures == 2
    model.sample(4, None if y is None else y[:4], ode=ODE("dopri5", tolerance=0.1))
    assert StandIn.captures == 2


def test_a_divergence_within_a_graph_is_an_error_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    model = build("flow-matching", data_shape=(2,), width=8, blocks=1, solver="euler", steps=2)
    torch.nn.init.constant_(model.velocity.leave.bias, torch.inf)
    with pytest.raises(ODEDiverged):
        model.sample(2)


def test_what_cannot_be_captured_runs_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    stand_in(monkeypatch)
    monkeypatch.setattr(step_graphs, "record", refuse)
    graphs, model, x = StepGraphs(), nn.Linear(2, 2), torch.randn(3, 2)
    with pytest.warns(TarFlowWarning, match=r"without a CUDA graph: operation not permitted when .* capturing$"):
        assert torch.equal(graphs.run("key", model, (x,), model), model(x))
    assert torch.equal(graphs.run("key", model, (x,), model), model(x))  # and without another warning


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
