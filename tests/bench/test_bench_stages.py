"""The stages of `bench gpu` are processes that may hang or crash, and a cell whose process did is told of."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_in import bench, quick_limits, stand_in

from bench.common import record
from bench.suites.gpu import cells
from bench.suites.gpu import suite as gpu

WRITES = "import json, sys; json.dump([json.loads(sys.argv[1])], open(sys.argv[2], 'w'))"


def command(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_a_stage_is_given_its_request_and_leaves_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "COMMAND", command(WRITES))
    assert cells.in_process({"a": [1.5, None]}, 60.0) == [{"a": [1.5, None]}]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os; os.abort()", "its process ended with -6: "),
        ("raise SystemExit('no such kernel')", "its process ended with 1: no such kernel"),
        ("import time; time.sleep(60)", "its process ended with None: stopped after 1 s"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="exit codes of POSIX")
def test_a_stage_that_goes_wrong_is_told(code: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "COMMAND", command(code))
    with pytest.raises(RuntimeError, match=said):
        cells.in_process({}, 1.0 if "sleep" in code else 60.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run is for the interpreter, and kernels are compiled here")
def test_a_cell_whose_process_dies_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick_limits(monkeypatch)
    asked: list[Any] = []

    def in_process(request: dict[str, Any], seconds: float) -> Any:
        asked.append(seconds)
        if request["case"] == "afhq:2:loss":
            raise RuntimeError("its process ended with -6: Aborted")
        return cells.cell(**{**request, "dry": True})

    monkeypatch.setattr(cells, "in_process", in_process)
    monkeypatch.setattr(gpu, "_device", lambda dry: torch.device("cpu"))
    monkeypatch.setattr(gpu, "cuda_missing", lambda device, dtype: "not built")
    out, wanted = tmp_path / "run.json", ("--cell", "afhq:2:loss", "--cell", "imagenet:1:loss")
    for name in cells.SIZES:
        monkeypatch.setitem(cells.SIZES, name, cells.models.DRY[name])
    arguments = ("--ml-tarflow", stand_in(tmp_path), "--repeat", "2", "--out", out, "--skip-tests", *wanted)
    result = bench("gpu", *arguments)
    assert result.exit_code == 1
    assert len(asked) == 2
    assert all(0 < seconds < 2000 for seconds in asked)
    made = record.read(out)
    dead, alive = made["cells"]
    assert (dead["runs"], dead["check"]["passed"]) == ([], False)
    assert len(alive["runs"]) == 2
    assert dead["check"]["reason"] == "RuntimeError: its process ended with -6: Aborted"
    assert "1 of 2 checks failed" in result.output
