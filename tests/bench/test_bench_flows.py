"""`bench flows`: what is measured, what is checked first, and the suite from end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from stand_in import bench, quick_limits

from bench.common import harness, record
from bench.suites.flows import libraries, suite
from bench.suites.flows.libraries import LIBRARIES, density_of
from bench.suites.flows.suite import COMPILED, DENSITY, OURS, OWN, SUITE

pytest.importorskip("zuko")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick_limits(monkeypatch)


def run(out: Path, *more: str, library: str = "zuko") -> Any:
    sizes = ("--dims", "3", "--hidden", "8", "--batch", "4", "--steps", "2", "--threads", "1", "--repeat", "2")
    return bench("flows", "--library", library, *sizes, "--out", out, *more)


def only_cell(out: Path, *more: str) -> Any:
    """Returns the cell of a small MAF, whose run ended well."""
    result = run(out, "--family", "maf", *more)
    assert result.exit_code == 0, result.output
    (cell,) = record.read(out)["cells"]
    return cell


def names(cell: Any) -> list[str]:
    return [each["name"] for each in cell["runs"]]


@pytest.mark.parametrize("context", [(), ("--context",)], ids=["plain", "context"])
def test_end_to_end(tmp_path: Path, context: tuple[str, ...]) -> None:
    out = tmp_path / "run.json"
    result = run(out, "--solver", "sequential", "--solver", "auto", *context)
    assert result.exit_code == 0, result.output
    made = record.read(out)
    assert [cell["label"]["family"] for cell in made["cells"]] == ["maf", "nsf"]
    for cell in made["cells"]:
        assert cell["check"]["passed"]
        assert names(cell) == [DENSITY, OWN, *map(OURS.format, ("sequential", "auto"))]
        assert all(each["fraction_of_limit"] > 0 for each in cell["runs"])
    assert f"{DENSITY} " in result.output
    assert "   1.00  " in result.output
    assert "4 samples, 1 thread: our time" in result.output
    assert "\n| | D = 3 |\n|---|---|\n| zuko maf | " in result.output
    with Image.open(out.with_suffix(".png")) as picture:
        assert picture.size[0] > 300


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("library", "more", "flows"),
    [
        ("nflows", (), ["maf", "nsf"]),
        ("nflows", ("--context",), ["maf", "nsf"]),
        ("normflows", (), ["maf", "nsf"]),
        ("normflows", ("--context",), ["nsf"]),
        pytest.param("sbi", (), ["maf", "nsf", "zuko_nsf"], marks=pytest.mark.slow),
    ],
)
def test_every_library(tmp_path: Path, library: str, more: tuple[str, ...], flows: list[str]) -> None:
    pytest.importorskip(library)
    result = run(tmp_path / "run.json", *more, library=library)
    assert result.exit_code == 0, result.output
    cells = record.read(tmp_path / "run.json")["cells"]
    assert [cell["label"]["family"] for cell in cells] == flows
    for cell in cells:
        assert names(cell) == [DENSITY, OWN, OURS.format("sequential")]


def test_a_parallel_solver_s_passes_are_noted(tmp_path: Path) -> None:
    cell = only_cell(tmp_path / "run.json", "--solver", "sequential", "--solver", "adaptive")
    assert len(cell["runs"][-1]["passes"]) == libraries.TRANSFORMS
    assert all(1 <= each <= 4 for each in cell["runs"][-1]["passes"])


def test_what_takes_long_is_run_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "PART", 2)
    monkeypatch.setattr(suite, "LONGEST", 0.0)
    monkeypatch.setattr(harness, "wall", lambda run: (run(), 1.0)[1])
    monkeypatch.setattr(harness, "timer_of", lambda device: harness.wall)
    cell = only_cell(tmp_path / "run.json", "--own-seconds", "4")
    assert {each["name"]: each["part"] for each in cell["runs"]} == dict.fromkeys(names(cell), 0.5)
    assert [each["median"] for each in cell["runs"]] == [2.0, 2.0, 2.0]
    assert bench("show", tmp_path / "run.json").output.count("≈2") == 3


def test_a_library_s_own_inverse_that_takes_long_is_left_out(tmp_path: Path) -> None:
    cell = only_cell(tmp_path / "run.json", "--own-seconds", "0")
    assert names(cell) == [DENSITY, OURS.format("sequential")]
    assert [each["name"] for each in cell["left_out"]] == [OWN]
    assert "4 samples would take" in cell["left_out"][0]["reason"]


def test_a_library_s_own_samples_of_large_batches_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "PART", 1)
    cell = only_cell(tmp_path / "run.json")
    assert names(cell) == [DENSITY, OURS.format("sequential")]
    assert cell["left_out"] == [{"name": OWN, "reason": "as with 2 samples, time is linear in them"}]


@pytest.mark.parametrize("works", [True, False])
def test_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, works: bool) -> None:
    def compile(function: Any) -> Any:
        return function if works else lambda *given: 1 / 0

    monkeypatch.setattr(torch, "compile", compile)
    cell = only_cell(tmp_path / "run.json", "--compile")
    made = [COMPILED.format(name) for name in (DENSITY, OWN)]
    assert [name for name in names(cell) if name in made] == (made if works else [])
    assert [each["name"] for each in cell["left_out"]] == ([] if works else made)
    assert works or "ZeroDivisionError" in cell["left_out"][0]["reason"]


@pytest.mark.parametrize("what", ["x", "log q"])
def test_what_is_wrong_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    def wrong(*given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        x, log_q = right(*given)
        return (x + 0.01, log_q) if what == "x" else (x, log_q + 0.1)

    right = suite.sample_with_log_prob
    monkeypatch.setattr(suite, "sample_with_log_prob", wrong)
    result = run(tmp_path / "run.json", "--family", "maf")
    assert result.exit_code == 1
    assert "differs by" in result.output
    assert record.read(tmp_path / "run.json")["cells"][0]["runs"] == []


def test_a_library_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "find_spec", lambda name: None)
    result = run(tmp_path / "run.json")
    assert result.exit_code == 1
    assert "zuko is not installed; pip install 'tarflow_fast[flows]'" in result.output


def test_a_chain_bends() -> None:
    x = density_of(4000, 5, None, torch.Generator().manual_seed(0))
    assert x.shape == (4000, 5)
    assert 0.8 < x[:, 0].abs().mean() < 1.2  # two clusters
    rest = x[:, 1:] - 0.6 * x[:, :-1] - 0.5 * torch.sin(2 * x[:, :-1])
    assert rest.std() == pytest.approx(0.5, abs=0.02)
    moved = density_of(4000, 5, torch.full((4000, libraries.CONTEXT), 3.0), torch.Generator().manual_seed(0))
    assert torch.allclose(moved, x + 3)


def test_every_flow_has_a_case() -> None:
    assert set(LIBRARIES) == {"zuko", "nflows", "normflows", "sbi"}
    assert SUITE.name == "flows"
