"""A record: its file, its machine, its table and its picture."""

from __future__ import annotations

import itertools
import json
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_in import bench

from bench.common import harness, machine, record, roofline
from bench.common.harness import TOLERANCE, Case
from bench.common.limits import hold
from bench.suites.peers import SUITES

SUITE = SUITES[0]


def made_up_record(*, failed: bool = False) -> dict[str, Any]:
    work = roofline.Work(flops=4_000_000_000, bytes=1_000_000_000, weight_bytes=10, working_set=20)
    samples = {"theirs": [4.0, 4.4, 4.2], "torch": [2.0, 2.1, 2.2], "torch compiled": [1.0, 1.0, 1.0]}
    checks = {"passed": True, "max_error": 1e-6, "tolerance": TOLERANCE, "reason": None}
    cell = {"label": {"model": "m", "batch": 1, "guidance": 0.0}, "check": checks, "work": work._asdict()}
    cells = [{**cell, "runs": harness.runs_of(samples, work)}]
    slow = {"float32_flops_per_second_2": 1e11, "read_bandwidth_2": [{"bytes": 20, "bytes_per_second": 2e9}]}
    hold(cells[0], slow, Case({}, work=work, threads=2))  # 0.5 s of memory traffic
    if failed:
        bad = {**checks, "passed": False, "max_error": None, "reason": "torch: not finite"}
        cells.append({"label": {"model": "m", "batch": 64, "guidance": 2.0}, "check": bad, "runs": []})
    return {
        "suite": "peers",
        "machine": {"cpu": "a processor", "os": "a system", "torch": "2.x"},
        "settings": {"baseline": "theirs", "threads": 2, "dtype": "float32"},
        "limits": {
            "matrix_flops_per_second": 1e11,
            "read_bandwidth": [{"bytes": 2**20, "bytes_per_second": 5e10}],
        },
        "cells": cells,
    }


def test_runs_hold_every_sample_and_the_rates_at_the_median() -> None:
    theirs, ours, _ = made_up_record()["cells"][0]["runs"]
    assert theirs["seconds"] == [4.0, 4.4, 4.2]
    assert "ratio" not in theirs
    assert ours["ratio"]["samples"] == pytest.approx([2.0, 4.4 / 2.1, 4.2 / 2.2])
    assert ours["ratio"]["median"] == 2.0
    assert ours["median"] == 2.1
    assert ours["fraction_of_limit"] == pytest.approx(0.5 / 2.1)
    assert ours["bytes_per_second"] == pytest.approx(1e9 / 2.1)
    assert ours["flops_per_second"] == pytest.approx(4e9 / 2.1)


def test_the_table_is_aligned_and_a_failed_cell_has_no_times() -> None:
    lines = SUITE.table(made_up_record(failed=True)).splitlines()
    head, *rows = lines[4:]
    assert lines[1:3] == ["matrix flops per second: 100.0 GFLOP/s", "read bandwidth: 50.0 GB/s at 1 MiB"]
    assert [row.split()[3] for row in rows] == ["theirs", "torch", "torch", "FAILED"]
    for column in ("seconds", "n", "faster", "of limit"):
        end = head.index(f" {column}") + 1 + len(column)
        assert all(row[end - 1] != " " and row[end : end + 1] in ("", " ") for row in rows), column
    assert rows[1].split()[4:8] == ["2.1", "2.04-2.16", "3", "2.00x"]
    assert rows[3].split()[4:11] == ["-"] * 7
    assert rows[3].endswith("torch: not finite")


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.json"
    record.write(made_up_record(failed=True), path)
    assert record.read(path) == made_up_record(failed=True)
    with pytest.raises(ValueError, match="JSON"):
        record.write({"error": float("nan")}, path)


def test_the_picture_has_a_bar_for_each_run() -> None:
    made = made_up_record(failed=True)
    figure = SUITE.figure(made)
    passed, failed = figure.axes
    runs, bars = made["cells"][0]["runs"], passed.patches
    assert [bar.get_height() for bar in bars] == pytest.approx([run["ratio"]["median"] for run in runs[1:]])
    assert all(a.get_x() + a.get_width() <= b.get_x() for a, b in itertools.pairwise(bars))  # side by side
    assert bars[0].get_x() > -0.5  # about their cell
    assert bars[-1].get_x() + bars[-1].get_width() < 0.5
    assert [text.get_text() for text in passed.texts] == ["2.00×\n24%", "4.20×\n50%"]
    assert [text.get_text() for text in failed.texts] == ["check\nfailed"]
    assert [axes.get_title() for axes in figure.axes] == ["model m, guidance 0", "model m, guidance 2"]
    assert [text.get_text() for text in failed.get_xticklabels()] == ["batch 64"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["torch", "torch compiled"]


def test_show_draws_a_finished_run_again(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    record.write(made_up_record(), path)
    result = bench("show", path)
    assert result.exit_code == 0, result.output
    assert SUITE.table(made_up_record()) in result.output
    assert path.with_suffix(".png").stat().st_size > 0
    for text in ("{", "[]", '{"cells": []}', '{"cells": [{}]}'):
        path.write_text(text)
        result = bench("show", path)
        assert result.exit_code == 2
        assert "not a record of this bench" in result.output


def test_the_machine_is_described_without_its_name_or_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    described = machine.describe(machine.CPU)
    assert described["torch"] == torch.__version__
    assert described["logical_cores"] >= 1
    text = json.dumps(described)
    assert str(Path.cwd()) not in text
    assert str(machine.ROOT) not in text
    monkeypatch.setattr(platform, "node", lambda: pytest.fail("asked for the machine's name"))
    machine.describe(machine.CPU)


def test_a_copy_without_git_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.commit() == {"commit": None, "dirty": None}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.commit() == {"commit": None, "dirty": None}
