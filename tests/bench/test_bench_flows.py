"""`bench flows`: what is measured, what is checked first, and the suite from end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from stand_in import bench, quick_limits

from bench.common import record
from bench.suites import flows
from bench.suites.flows import DENSITY, OURS, OWN, SUITE, density_of

pytest.importorskip("zuko")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick_limits(monkeypatch)


def run(out: Path, *more: str) -> Any:
    sizes = ("--dims", "3", "--hidden", "8", "--batch", "4", "--steps", "2", "--threads", "1", "--repeat", "2")
    return bench("flows", "--library", "zuko", *sizes, "--out", out, *more)


@pytest.mark.parametrize("context", [(), ("--context",)], ids=["plain", "context"])
def test_end_to_end(tmp_path: Path, context: tuple[str, ...]) -> None:
    out = tmp_path / "run.json"
    result = run(out, "--solver", "sequential", "--solver", "auto", *context)
    assert result.exit_code == 0, result.output
    made = record.read(out)
    assert [cell["label"]["family"] for cell in made["cells"]] == ["maf", "nsf"]
    for cell in made["cells"]:
        assert cell["check"]["passed"]
        assert [each["name"] for each in cell["runs"]] == [DENSITY, OWN, *map(OURS.format, ("sequential", "auto"))]
        assert all(each["fraction_of_limit"] > 0 for each in cell["runs"])
    assert f"{DENSITY} " in result.output
    assert "   1.00  " in result.output
    with Image.open(out.with_suffix(".png")) as picture:
        assert picture.size[0] > 300


@pytest.mark.parametrize("what", ["x", "log q"])
def test_what_is_wrong_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    def wrong(*given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        x, log_q = right(*given)
        return (x + 0.01, log_q) if what == "x" else (x, log_q + 0.1)

    right = flows.sample_with_log_prob
    monkeypatch.setattr(flows, "sample_with_log_prob", wrong)
    result = run(tmp_path / "run.json", "--family", "maf")
    assert result.exit_code == 1
    assert "differs by" in result.output
    assert record.read(tmp_path / "run.json")["cells"][0]["runs"] == []


def test_a_library_s_own_inverse_of_many_passes_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "OWN_STEPS", 2)
    assert run(tmp_path / "run.json", "--family", "maf").exit_code == 0
    (cell,) = record.read(tmp_path / "run.json")["cells"]
    assert [each["name"] for each in cell["runs"]] == [DENSITY, OURS.format("sequential")]


def test_a_library_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "find_spec", lambda name: None)
    result = run(tmp_path / "run.json")
    assert result.exit_code == 1
    assert "zuko is not installed; pip install 'tarflow_fast[flows]'" in result.output


def test_a_chain_bends() -> None:
    x = density_of(4000, 5, None, torch.Generator().manual_seed(0))
    assert x.shape == (4000, 5)
    assert 0.8 < x[:, 0].abs().mean() < 1.2  # two clusters
    rest = x[:, 1:] - 0.6 * x[:, :-1] - 0.5 * torch.sin(2 * x[:, :-1])
    assert rest.std() == pytest.approx(0.5, abs=0.02)
    moved = density_of(4000, 5, torch.full((4000, flows.CONTEXT), 3.0), torch.Generator().manual_seed(0))
    assert torch.allclose(moved, x + 3)


def test_every_flow_has_a_case() -> None:
    assert set(flows.LIBRARIES) == {"zuko", "nflows", "normflows"}
    assert SUITE.name == "flows"
