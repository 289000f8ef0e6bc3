"""Suites are found by looking: a made-up one is a new file, and what there is keeps its commands and its records."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from on_gpu import FILES
from stand_in import bench

from bench import suites
from bench.common import record
from bench.common.machine import ROOT
from bench.suites import find_suites, suite_of

COMMANDS = [
    "auto",
    "cpu",
    "density",
    "families",
    "flows",
    "gpu",
    "kernels",
    "limit",
    "load",
    "peers",
    "pictures",
    "show",
    "solver",
    "tuning",
]
SUITES = ROOT / "bench" / "suites"
RECORDS = sorted((ROOT / "bench" / "results").glob("*.json"))

MADE_UP = """
from dataclasses import dataclass
from bench.common import options
from bench.common.harness import admit_all, runs_of
from bench.common.suite import Suite
import torch

@dataclass
class Case:
    size: int

    @property
    def label(self):
        return {"size": self.size}

class MadeUp(Suite):
    '''Adds, once and twice.'''

    name, baseline = "made-up", "once"
    options = (options.batches(1, 2), *options.of_every_suite("made-up", 5.0))

    def cases(self):
        return [Case(size) for size in self.chosen.batches]

    def measure(self, case):
        x = torch.ones(case.size)
        candidates = {"once": lambda: lambda: x + 2, "twice": lambda: lambda: x + 1 + 1}
        trials, check = admit_all(candidates)
        samples = self.rounds.alternate({name: trial.run for name, trial in trials.items()})
        return {"label": case.label, "check": check, "runs": runs_of(samples)}

    def verdicts(self, record):
        return [] if len(record["cells"]) == 2 else ["expected two sizes"]

    def lines(self, record):
        return [f"size {cell['label']['size']}: {cell['runs'][1]['ratio']['median']:.2f}x" for cell in record["cells"]]

    def figure(self, record):
        from matplotlib.figure import Figure
        return Figure()

SUITE = MadeUp()
"""


@pytest.mark.parametrize("place", ["made_up.py", "made_up/suite.py"])
def test_a_new_suite_is_one_new_file(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.write_text(MADE_UP)
    if path.parent != tmp_path:
        (path.parent / "__init__.py").touch()
    monkeypatch.setattr(suites, "__path__", [*suites.__path__, str(tmp_path)])
    monkeypatch.setattr("bench.common.harness.REST", 0.0)
    for name in ("made_up", "made_up.suite"):
        monkeypatch.delitem(__import__("sys").modules, f"bench.suites.{name}", raising=False)
    assert "made-up" in bench("--help").output
    assert "Adds, once and twice." in bench("made-up", "--help").output
    out = tmp_path / "run.json"
    result = bench("made-up", "--repeat", 2, "--out", out)
    assert result.exit_code == 0, result.output
    made = record.read(out)
    assert made["suite"] == "made-up"
    assert [len(run["seconds"]) for cell in made["cells"] for run in cell["runs"]] == [2] * 4
    assert suite_of(made).table(made) in bench("show", out).output
    result = bench("made-up", "--repeat", 1, "--batch", 3, "--out", out)
    assert result.exit_code == 1
    assert "expected two sizes" in result.output


def test_every_command_is_there_and_says_what_it_does() -> None:
    listed = bench("--help").output.split("Commands:")[1].splitlines()
    assert [line.split()[0] for line in listed if line.strip()] == COMMANDS
    for name in COMMANDS:
        assert bench(name, "--help").exit_code == 0


def test_no_suite_imports_another() -> None:
    for path in SUITES.rglob("*.py"):
        inside = len(path.relative_to(SUITES).parts) - 1  # a suite's own folder, or none
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                beyond = node.level > inside
                assert not beyond or (node.module or "").split(".")[0] == "common", f"{path}: {ast.unparse(node)}"
            elif isinstance(node, ast.Import | ast.ImportFrom):
                assert "bench" not in ast.unparse(node), f"{path}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_every_committed_record_is_shown(path: Path, tmp_path: Path) -> None:
    made = record.read(path)
    suite = suite_of(made)
    assert suite.table(made).startswith("machine: ")
    suite.draw(made, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_records_of_no_suite_are_told() -> None:
    assert len(RECORDS) == 24
    assert len(find_suites()) == 13
    with pytest.raises(LookupError):
        suite_of({"suite": "none"})


def test_the_tests_that_run_on_a_gpu_are_there() -> None:
    assert len(set(FILES)) == len(FILES) > 10
    for file in FILES:
        text = (ROOT / file).read_text(encoding="utf-8")
        helpers = ("engines", "engine_laws", "cuda_engines", "triton_engines")  # which use it
        assert "KERNEL_DEVICE" in text or any(f"from {name} import" in text for name in helpers), file
