"""The laws of engines, and the sampler's results, through an engine that hands each size of batch to another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import engine_laws
import pytest
import torch
from cases import random_latents, random_model
from engines import GUIDED, NATIVE, engine_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import GOLDEN

from tarflow_fast import Sampler
from tarflow_fast.backend import registry
from tarflow_fast.engine import BlockState, Condition, Guidance, probe
from tarflow_fast.engine.autotune import AutotunedEngine
from tarflow_fast.sampling import sampler


@pytest.fixture(params=["torch", NATIVE])
def served(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """backend="auto" of engines that are to be had here, of which this one is the quickest."""
    monkeypatch.setattr(registry, "PROVEN_ON_GPU", ("torch", "cpu"))
    monkeypatch.setattr(probe, "seconds", lambda engine, run: 1.0 if quick(engine) == request.param else 2.0)
    return str(request.param)


def quick(engine: Any) -> str:
    return {"TorchEngine": "torch", "CpuEngine": "cpu"}[type(engine).__name__]


LAWS = {
    "reference": lambda: engine_laws.check_reverse(
        "auto", GUIDED, 3, 1, {"num_classes": 4, "channels": 128, "layers_per_block": 2, "img_size": 6}
    ),
    "volume-preserving": lambda: engine_laws.check_reverse("auto", Guidance(), 2, 0, {"num_classes": 2, "nvp": False}),
    "one token": lambda: engine_laws.check_reverse("auto", Guidance(), 4, 0, {"img_size": 4, "patch_size": 4}),
    "progress": lambda: engine_laws.check_progress("auto"),
    "ragged": lambda: engine_laws.check_raggedness("auto"),
    "causal": lambda: engine_laws.check_causality("auto", GUIDED, torch.nan),
    "residual": lambda: engine_laws.check_residual("auto", True),
    "autocast": lambda: engine_laws.check_autocast("auto"),
    "spent": lambda: engine_laws.check_reuse("auto"),
    "bytes": lambda: engine_laws.check_bytes("auto", True),
    "window": lambda: engine_laws.check_window_refused("auto", (3, 2)),
    "part": lambda: engine_laws.check_part_refused("auto", (3, 2)),
}


@pytest.mark.parametrize("law", LAWS)
def test_laws_of_engines(served: str, law: str) -> None:
    engine = engine_of(random_model(), 0, "auto")
    state = engine.begin(random_latents(random_model(), 1), Condition())
    assert isinstance(engine, AutotunedEngine)
    assert state.delegate is not None
    assert state.delegate[0] == served
    LAWS[law]()


@pytest.mark.parametrize("backend", ["torch", NATIVE])
@pytest.mark.parametrize("law", [engine_laws.check_windows, engine_laws.check_parts])
@settings(max_examples=5)
@given(data=st.data())
def test_laws_of_windows_and_parts(backend: str, law: Any, data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "PROVEN_ON_GPU", ("torch", "cpu"))
        patch.setattr(probe, "seconds", lambda engine, run: 1.0 if quick(engine) == backend else 2.0)
        law("auto", torch.float32, GOLDEN, GUIDED, data)


# Through the sampler


@pytest.mark.parametrize("solver", ["sequential", "adaptive"])
def test_results_are_those_of_the_engine_that_serves(monkeypatch: pytest.MonkeyPatch, served: str, solver: str) -> None:
    model = random_model(5, num_classes=2)
    wanted = Sampler(model, backend=served, solver=solver)
    monkeypatch.setattr(sampler, "choose_backend", lambda *request: ("auto", "the quickest of several"))
    auto = Sampler(model, solver=solver)
    assert (auto.backend, auto.backend_reason) == ("auto", "the quickest of several")
    for guidance in (0.0, 1.5):
        found, alone = (each.sample(5, [0, 1, -1], guidance=guidance, batch_size=3) for each in (auto, wanted))
        assert torch.equal(found.images, alone.images)
        assert guidance or torch.equal(found.log_prob, alone.log_prob)  # type: ignore[arg-type]
        assert found.report.backend == served
        other, guided = "cpu" if served == "torch" else "torch", ", guided" if guidance else ""
        why = f"the quickest of torch, cpu: 2.0x {other} at batch 3{guided}"
        assert found.report.backend_reason == why
        assert found.report.setup_seconds > 0
    again = auto.sample(5, [0, 1, -1], batch_size=3)
    assert again.report.setup_seconds == 0
    z = random_latents(model, 2)
    assert torch.equal(auto.reverse(z), wanted.reverse(z))


@pytest.mark.skipif(bool(NATIVE.marks[0].args[0]), reason="of two engines")
def test_the_report_names_every_engine_that_served(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(engine: Any, run: Callable[[], None]) -> float:
        run()
        return {"torch": 1.0, "cpu": 0.3 * batch[0]}[quick(engine)]

    batch = [0]
    begin = AutotunedEngine.begin

    def beginning(self: AutotunedEngine, z: torch.Tensor, *arguments: Any, **named: Any) -> BlockState:
        batch[0] = z.shape[0]
        return begin(self, z, *arguments, **named)

    monkeypatch.setattr(registry, "PROVEN_ON_GPU", ("torch", "cpu"))
    monkeypatch.setattr(probe, "seconds", told)
    monkeypatch.setattr(AutotunedEngine, "begin", beginning)
    monkeypatch.setattr(sampler, "choose_backend", lambda *request: ("auto", "the quickest of several"))
    report = Sampler(random_model()).sample(10, batch_size=4).report
    assert report.backend == "torch, cpu"
    assert report.backend_reason == (
        "the quickest of torch, cpu: 1.2x cpu at batch 4; the quickest of torch, cpu: 1.7x torch at batch 2"
    )
