"""`tarflow-fast check`: what it probes, what it prints, and its exit code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cases import random_model
from click.testing import CliRunner, Result
from fake_device import NARROW, QUICK, fake
from probe_jobs import probe_here

import tarflow_fast as tff
from tarflow_fast.backend import registry
from tarflow_fast.cache import CACHE_VARIABLE
from tarflow_fast.cli import main
from tarflow_fast.engine.backend import Backend
from tarflow_fast.probe import prober


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Any]]:
    """A CPU as a device on which backends have to be proven; those that are put into this list. Notes the jobs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(prober, "_known", {})
    monkeypatch.setattr(prober, "default_backend", lambda request: ("torch", "the test's"))
    tff.save(random_model(img_size=4, channels=16, head_dim=8), "m.safetensors")
    added: list[Any] = []
    yield added
    for backend in added:
        registry.unregister(backend.name)


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    noted: list[Any] = []

    def noting(job: Any, *rest: Any) -> Any:
        noted.append(job)
        return probe_here(job, *rest)

    monkeypatch.setattr(prober, "probe", noting)
    return noted


def add(device: list[Any], *backends: Backend) -> None:
    for backend in backends:
        registry.register(backend)
        device.append(backend)


def check(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["check", *map(str, arguments)], prog_name="tarflow-fast")
    assert result.exit_code == code, result.output
    return result


def test_without_a_gpu_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    lines = check().stdout.splitlines()
    assert lines[0] == "Nothing to check: there is no GPU here. The backends of GPUs, and what each is missing:"
    assert [line.split()[0] for line in lines[1:]] == ["cuda", "triton", "torch"]
    assert all("torch" in line for line in lines[1:])
    report = json.loads(check("--json").stdout)
    assert (report["device"], report["verdicts"]) == (None, [])
    assert check("--quiet").output == ""
    assert "no backend that can run on cpu has to be proven there" in check("--device", "cpu").stdout


def test_a_table_of_what_was_tried(device: list[Any], jobs: list[Any]) -> None:
    add(device, fake(), fake("wrong rows"))
    result = check("m.safetensors", "--device", "cpu", "--batch", 9, "--no-guidance", code=1)
    lines = result.stdout.splitlines()
    good = next(line for line in lines if line.startswith("fake, none, batch 9: "))
    bad = next(line for line in lines if line.startswith("fake, wrong rows, batch 9: "))
    assert "proven, " in good
    assert " ms by torch, " in good
    assert "FAILED (accuracy, batch 9: " in bad
    row = lines[lines.index(bad) + 1]
    assert row.split()[:3] == ["accuracy,", "batch", "9"]
    assert " of " in row
    assert row.endswith("would do")
    assert lines[lines.index(good) + 1].endswith(" s  ok")
    assert result.stderr == ""


def test_what_is_known_is_not_probed_unless_asked(device: list[Any], jobs: list[Any]) -> None:
    add(device, fake())
    line = ("m.safetensors", "--device", "cpu", "--batch", 2, "--guidance")
    for count, more in ((1, ()), (1, ()), (2, ("--again",)), (2, ())):
        check(*line, *more)
        assert len(jobs) == count
    assert jobs[0].size == (2, True)


def test_sizes_by_default(device: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from gates import proven

    asked: list[Any] = []
    monkeypatch.setattr(prober, "probe", lambda job, *rest: asked.append(job.size) or proven("fake, none", 1.0))
    add(device, fake())
    check("m.safetensors", "--device", "cpu", "--dtype", "bfloat16")
    assert asked == [(batch, guided) for batch in (1, 16, 64) for guided in (False, True)]


def test_what_does_not_take_the_model(device: list[Any], jobs: list[Any]) -> None:
    add(device, NARROW)
    tff.save(random_model(img_size=4, channels=64, head_dim=64), "wide.safetensors")
    assert "narrow does not take this model: no heads of 64" in check("wide.safetensors", "--device", "cpu").stdout
    assert jobs == []


def test_json_and_progress(device: list[Any], jobs: list[Any]) -> None:
    add(device, QUICK)
    result = check("m.safetensors", "--device", "cpu", "--batch", 1, "--no-guidance", "--json", "--progress")
    report = json.loads(result.stdout)
    assert report["device"] == "cpu"
    (found,) = report["verdicts"]
    assert (found["what"], found["proven"]) == ("quick, batch 1", True)
    assert {row["check"] for row in found["rows"]} >= {"accuracy, batch 1", "same bits again, batch 1"}
    assert "quick, batch 1 (1 of 1)" in result.stderr


def test_a_model_has_one_name() -> None:
    assert "give one" in check("m.safetensors", "-m", "m.safetensors", code=2).stderr
