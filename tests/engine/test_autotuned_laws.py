"""The laws of engines, and the sampler's results, through an engine that hands each size of batch to another."""

from __future__ import annotations

import functools
from typing import Any

import engine_laws
import engines
import pytest
import torch
from cases import random_latents, random_model
from engines import GUIDED, NATIVE, engine_of
from gates import Told, pretend_probed, proven
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import GOLDEN

from tarflow_fast import Sampler
from tarflow_fast.backend import make_engines
from tarflow_fast.engine import Condition, Guidance
from tarflow_fast.engine.autotune import AutotunedEngine
from tarflow_fast.sampling import sampler


def serve(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let backend="auto" be of two engines that are to be had here, of which this one is the quickest."""
    pretend_probed(monkeypatch, "cpu")
    gate = Told(cpu=proven("cpu", 2.0 if backend == "torch" else 0.5))
    monkeypatch.setattr(engines, "make_engines", functools.partial(make_engines, gate=gate))
    monkeypatch.setattr(sampler, "Prober", lambda *model: gate)
    monkeypatch.setattr(sampler, "choose_backend", lambda *request: ("auto", "the quickest of several"))


@pytest.fixture(params=["torch", NATIVE])
def served(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    serve(request.param, monkeypatch)
    return str(request.param)


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
        serve(backend, patch)
        law("auto", torch.float32, GOLDEN, GUIDED, data)


# Through the sampler


@pytest.mark.parametrize("solver", ["sequential", "adaptive"])
@pytest.mark.parametrize("served", ["torch", NATIVE])
def test_results_are_those_of_the_engine_that_serves(monkeypatch: pytest.MonkeyPatch, served: str, solver: str) -> None:
    model = random_model(5, num_classes=2)
    wanted = Sampler(model, backend=served, solver=solver)
    serve(served, monkeypatch)
    auto = Sampler(model, solver=solver)
    assert (auto.backend, auto.backend_reason) == ("auto", "the quickest of several")
    for guidance in (0.0, 1.5):
        found, alone = (each.sample(5, [0, 1, -1], guidance=guidance, batch_size=3) for each in (auto, wanted))
        assert torch.equal(found.images, alone.images)
        assert guidance or torch.equal(found.log_prob, alone.log_prob)  # type: ignore[arg-type]
        assert found.report.backend == served
        other, guided = "cpu" if served == "torch" else "torch", ", guided" if guidance else ""
        assert found.report.backend_reason == f"the quickest that is proven: 2.0x {other} at batch 3{guided}"
    z = random_latents(model, 2)
    assert torch.equal(auto.reverse(z), wanted.reverse(z))


@pytest.mark.skipif(bool(NATIVE.marks[0].args[0]), reason="of two engines")
def test_the_report_names_every_engine_that_served(monkeypatch: pytest.MonkeyPatch) -> None:
    serve("cpu", monkeypatch)
    gate = Told(cpu=lambda size: proven("cpu", 0.3 * size.batch))
    monkeypatch.setattr(sampler, "Prober", lambda *model: gate)
    report = Sampler(random_model()).sample(10, batch_size=4).report
    assert report.backend == "torch, cpu"
    assert report.backend_reason == (
        "the quickest that is proven: 1.2x cpu at batch 4; the quickest that is proven: 1.7x torch at batch 2"
    )
