"""A sampler whose backends are probed: torch serves first, what is proven serves later, and what fails never does."""

from __future__ import annotations

import pickle
import time
from dataclasses import replace
from typing import Any

import fake_device
import pytest
import torch
from cases import random_model
from fake_device import QUICK, fake
from instruction_sets import SETS
from probe_jobs import probe_here
from remarks import Remarks
from tolerances import GOLDEN, assert_close

from tarflow_fast import Sampler
from tarflow_fast.backend import registry
from tarflow_fast.engine.verdict import Verdict
from tarflow_fast.errors import ArgumentError, DeviceFault
from tarflow_fast.probe import faults, parent, prober

pytestmark = pytest.mark.skipif(not SETS, reason="there is no engine that is quicker than PyTorch's")

SMALL = {"img_size": 6, "num_classes": 2, "channels": 16, "head_dim": 8}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes are made in this process, and "quick" is the quickest however busy the machine is."""

    def probed(*job: Any) -> Verdict:
        verdict = probe_here(*job)
        return replace(verdict, seconds={name: 0.5 if name == "quick" else 1.0 for name in verdict.seconds})

    monkeypatch.setattr(prober, "probe", probed)


def until_probed() -> None:
    deadline = time.monotonic() + 100
    while prober._queued:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_torch_serves_until_the_verdict_is_in(registered: list[Any], remarks: Remarks) -> None:
    """In a process of its own, as for users."""
    registered.append(QUICK)
    model = random_model(3, **SMALL)
    sampler = Sampler(model, solver="sequential")
    assert sampler.backend == "auto"
    first = sampler.sample(3, [0, 1], seed=5)
    assert first.report.backend == "torch"
    assert first.report.backend_reason == "all that is proven at batch 3; 'quick' being probed"
    until_probed()
    second = sampler.sample(3, [0, 1], seed=5)
    (seconds,) = (verdict.seconds for verdict in prober._known.values())
    assert seconds.keys() == {"torch", "quick"}
    quickest = min(seconds, key=seconds.__getitem__)  # on a busy machine it may be either
    assert second.report.backend == quickest
    assert second.report.backend_reason.startswith("the quickest that is proven: ")
    assert_close(second.images, first.images, GOLDEN)
    assert [message.split()[1] for message in remarks.messages] == ["'torch'", "'quick'"]
    remarks.clear()
    later = Sampler(model, solver="sequential", probe="never")
    assert later.sample(4, seed=5).report.backend == quickest
    assert remarks.messages == []


def test_the_switch_comes_between_batches(registered: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A verdict that comes in the middle of a batch, whose blocks all have one engine."""
    registered.append(QUICK)
    monkeypatch.setattr(prober, "probe", lambda *job: Verdict(True, "now", {"torch": 1.0, "quick": 0.1}))
    sampler = Sampler(random_model(3, **SMALL), solver="sequential", probe="background")
    served: list[str] = []

    def noted(engine: Any, state: Any, progress: Any) -> Any:
        until_probed()
        served.append(state.delegate[0])
        return solve(engine, state, progress)

    solve = sampler.solvers[0]
    parts = list(sampler.with_solvers([noted] * 2).stream(6, batch_size=2))
    assert served == ["torch", "torch", "quick", "quick", "quick", "quick"]
    assert [part.report.backend for part in parts] == ["torch", "quick", "quick"]


def test_now_and_never(registered: list[Any], here: None) -> None:
    registered.append(QUICK)
    model = random_model(3, **SMALL)
    never = Sampler(model, probe="never", solver="sequential").sample(2).report
    assert never.backend == "torch"
    assert "'quick': not probed on this device" in never.backend_reason
    assert Sampler(model, probe="now", solver="sequential").sample(2).report.backend == "quick"
    with pytest.raises(ArgumentError, match=r"^probe: expected"):
        Sampler(model, probe="later")


def test_a_backend_that_is_named_serves_without_a_probe(registered: list[Any], remarks: Remarks) -> None:
    registered.append(fake())
    sampler = Sampler(random_model(3, **SMALL), backend="fake, none", solver="sequential")
    assert sampler.sample(2).report.backend == "fake, none"
    assert remarks.messages == []


@pytest.mark.parametrize(
    "fault",
    [
        *("wrong rows", "NaN leaks", "looks ahead", "writes beyond", "other bits", "uses old memory", "leaks"),
        *("changes its input", "fails at import"),
    ],
)
def test_torch_goes_on_serving_where_one_fails(registered: list[Any], here: None, remarks: Remarks, fault: str) -> None:
    registered.append(fake(fault))
    model = random_model(3, **SMALL)
    sampler = Sampler(model, probe="now", solver="sequential")
    found = sampler.sample(9, seed=2)
    assert found.report.backend == "torch"
    assert torch.equal(found.images, Sampler(model, backend="torch", solver="sequential").sample(9, seed=2).images)
    assert len(remarks.messages) == 1
    assert remarks.messages[0].startswith(f"backend 'fake, {fault}' will not be used on cpu: ")


@pytest.mark.slow
def test_torch_goes_on_serving_after_a_crash(registered: list[Any], remarks: Remarks) -> None:
    registered.append(fake("crashes"))
    sampler = Sampler(random_model(3, **SMALL), solver="sequential")
    for _ in range(2):
        assert sampler.sample(2).report.backend == "torch"
        until_probed()
    assert "it was ended by" in remarks.messages[-1]
    assert not parent._running


def test_an_error_that_breaks_the_device_names_the_backend_and_revokes_it(
    registered: list[Any], here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered.append(fake("breaks later"))
    model, name = random_model(3, **SMALL), "fake, breaks later"
    monkeypatch.setattr(prober, "probe", lambda *job: Verdict(True, "passed", {"torch": 1.0, name: 0.5}))
    sampler = Sampler(model, probe="now", solver="sequential")
    assert sampler.sample(2).report.backend == name
    monkeypatch.setattr(fake_device, "broken_here", True)
    with pytest.raises(DeviceFault) as info:
        sampler.sample(2)
    assert info.value.backend == name
    assert str(info.value) == (
        f"backend '{name}' broke this process's use of the device (CUDA error: an illegal memory access was "
        f"encountered); start a new process to go on, in which backend='auto' does without '{name}' "
        "(`tarflow-fast check --again` probes it anew)"
    )
    prober._known.clear()  # as in a new process
    report = Sampler(model, probe="never", solver="sequential").sample(20).report
    assert report.backend == "torch"
    assert "it broke the device while it sampled" in report.backend_reason
    with pytest.raises(DeviceFault, match="'fake, breaks later'"):
        Sampler(model, backend=name, solver="sequential").sample(1)


def test_other_errors_stay_what_they_are(registered: list[Any]) -> None:
    cpu = torch.device("cpu")
    for error in (ValueError("CUDA error: an illegal memory access"), torch.OutOfMemoryError("CUDA out of memory")):
        assert not faults.breaks_device(error, cpu)
    assert not faults.breaks_device(RuntimeError("CUDA error: invalid argument"), cpu)
    for text in ("cudaLaunchKernelExC: cudaErrorIllegalAddress: x", "Triton Error [CUDA]: misaligned address"):
        assert faults.breaks_device(RuntimeError(text), cpu)
    registered.append(fake("raises"))
    with pytest.raises(ValueError, match="no such kernel"):
        Sampler(random_model(3, **SMALL), backend="fake, raises", solver="sequential").sample(1)


def test_options_go_with_a_pickle(registered: list[Any]) -> None:
    registered.append(QUICK)
    sampler = pickle.loads(pickle.dumps(Sampler(random_model(3, **SMALL), probe="never", solver="sequential")))
    assert sampler._options["probe"] == "never"
    assert "not probed" in sampler.sample(1).report.backend_reason


def test_without_candidates_nothing_is_probed() -> None:
    assert registry.candidates(registry.Request(torch.device("cpu")))[0] == []
    assert Sampler(random_model(3, **SMALL), probe="now").backend != "auto"
