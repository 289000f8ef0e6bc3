"""The CUDA engine in `bench gpu`: its parts in the emulation, the command, the table."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_emulation import IN_EMULATION
from stand_in import bench, quick_limits, stand_in

from bench.common import harness, models, record
from bench.common.harness import Rounds
from bench.common.machine import ROOT
from bench.suites.gpu import cells, inside
from bench.suites.gpu import suite as gpu
from bench.suites.gpu.cells import BASELINE, CUDA, TORCH, TRITON, case_of
from bench.suites.gpu.inside import PHASES, measure_phases
from bench.suites.gpu.suite import SUITE
from tarflow_fast.backend.cuda.engine import CudaEngine
from tarflow_fast.backend.triton import profile

CPU = torch.device("cpu")
ALL = 2 ** len(PHASES) - 1
PARAMS = ROOT / "csrc" / "cuda" / "params.h"


def test_phases_are_the_kernels() -> None:
    (names,) = re.findall(r"enum Phase : int \{ (.*), PHASES \};", PARAMS.read_text())
    assert tuple(names.lower().split(", ")) == PHASES


# Inside the engine


class Watched:
    """A launch that knows which phases it leaves out."""

    def __init__(self, launch: Any, log: list[int]):
        self.launch, self.log, self.skipped = launch, log, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.launch, name)

    def set_size(self, name: str, value: int) -> None:
        self.skipped = value if name == "skip_phases" else self.skipped
        self.launch.set_size(name, value)

    def run(self, **options: Any) -> None:
        self.log.append(self.skipped)
        self.launch.run(**options)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What each launch of the engine left out."""
    found: list[int] = []

    class Engine(CudaEngine):
        def _launch(self, *arguments: Any) -> Any:
            return Watched(super()._launch(*arguments), found)

    monkeypatch.setattr(inside, "CudaEngine", Engine)
    return found


def measured(text: str, batch: int | None = None) -> tuple[dict[str, Any], int]:
    """The inside of a pass, of a batch that may be larger than those of dry runs, and its steps."""
    case = case_of(text, dry=True)
    z, y = models.inputs(case.sizes, batch or case.label["batch"], 0)
    inputs = (z, y, cells.GUIDANCE[case.label["pass"]])
    return measure_phases(models.random_model(case.sizes, 0), inputs, Rounds(2, 100.0)), case.sizes.num_patches - 1


def cost(skipped: int) -> float:
    """Seconds of a made-up step: of each phase its number, from 1 on, and 3 of what cannot be left out."""
    return 3.0 + sum(number for number, _ in enumerate(PHASES, 1) if not skipped >> (number - 1) & 1)


@IN_EMULATION
def test_a_phase_takes_what_a_step_without_it_saves(log: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    steps = case_of("afhq:2:guided", dry=True).sizes.num_patches - 1

    def timer(run: Callable[[], object]) -> float:
        run()
        return steps * cost(log[-1])

    monkeypatch.setattr(harness, "timer_of", lambda device: timer)
    found, _ = measured("afhq:2:guided")
    passes = [0, 1, 2, 4, 8, 16, 32, 64, ALL]
    assert log == [*passes, *passes, *passes]  # warm, timed twice
    step, *phases, barriers = found["parts"]
    assert [phase["name"] for phase in phases] == [f"{name}, saved without it" for name in PHASES]
    for number, phase in enumerate(phases, 1):
        assert phase["seconds"] == pytest.approx([number, number])
        assert phase["median"] == pytest.approx(number)
    assert step["seconds"] == pytest.approx([31.0, 31.0])
    assert barriers["median"] == pytest.approx(3.0)
    assert (found["launches_per_pass"], found["barriers_per_token"]) == (1, 7)


@IN_EMULATION
def test_nothing_is_left_out_of_passes_after_a_variant(log: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also not if the variant fails."""
    states: list[Any] = []
    begin = CudaEngine.begin

    def kept(engine: CudaEngine, *arguments: Any) -> Any:
        states.append(begin(engine, *arguments))
        return states[-1]

    def interrupted(passes: dict[str, Callable[[], object]], rounds: Rounds) -> Any:
        monkeypatch.setattr(CudaEngine, "reverse", lambda *arguments: 1 / 0)
        for name, run in passes.items():
            with pytest.raises(ZeroDivisionError):
                run()
            assert states[0].cache.launch.skipped == 0, name
        raise KeyboardInterrupt

    monkeypatch.setattr(CudaEngine, "begin", kept)
    monkeypatch.setattr(inside, "_warm", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measured("afhq:1:unguided")
    assert len(states) == 1


@IN_EMULATION
@pytest.mark.parametrize(("batch", "passes"), [(16, 1), (32, 1), (33, 2), (128, 4)])
def test_each_launch_has_its_barriers(batch: int, passes: int, log: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """L + 2, as all else is sent."""

    def first(runs: dict[str, Callable[[], object]], rounds: Rounds) -> Any:
        runs[""]()
        return {name: [1.0] for name in runs}

    monkeypatch.setattr(inside, "_warm", first)
    found, _ = measured("afhq:1:guided", batch)
    assert log == [0] * passes
    assert (found["launches_per_pass"], found["barriers_per_token"]) == (passes, 3 * passes)


# The command


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short measurements, no compiler, and torch's images for those of the Triton engine, which the interpreter takes
    long for; it takes part in tests/test_bench_gpu.py."""
    if torch.cuda.is_available():
        pytest.skip("a dry run is for the interpreter, and kernels are compiled here")
    quick_limits(monkeypatch)
    monkeypatch.setattr(profile, "LAUNCHES", 2)
    cell = cells.cell
    monkeypatch.setattr(cells, "cell", lambda compiled, **how: cell(compiled=False, **how))
    monkeypatch.setattr(cells, "BACKEND", "torch")
    monkeypatch.setattr(inside, "measure_kernels", lambda *arguments: None)


def dry(folder: Path, *more: str) -> tuple[Any, dict[str, Any]]:
    """What the command printed, and its record."""
    out = folder / "run.json"
    arguments = ("--dry", "--ml-tarflow", stand_in(folder), "--repeat", "2", "--out", out, "--skip-tests", *more)
    result = bench("gpu", *arguments)
    return result, record.read(out)


def names(cell: dict[str, Any]) -> list[str]:
    return [run["name"] for run in cell["runs"]]


@IN_EMULATION
@pytest.mark.slow
def test_dry_run_end_to_end(tmp_path: Path, quick: None) -> None:
    cells = ("--cell", "afhq:1:guided", "--cell", "imagenet:1:unguided", "--cell", "afhq:1:loss")
    result, made = dry(tmp_path, *cells)
    assert result.exit_code == 0, result.output
    assert (made["checks"], made["without_cuda"]) == ([], None)
    guided, unguided, density = made["cells"]
    for cell, barriers in ((guided, 7), (unguided, 12)):
        assert names(cell) == [BASELINE, TORCH, TRITON, CUDA]
        assert cell["check"]["passed"]
        assert cell["cuda"]["barriers_per_token"] == barriers
        assert [part["name"].split(",")[0] for part in cell["cuda"]["parts"][1:-1]] == list(PHASES)
    assert "cuda" not in density
    lines = SUITE.table(made).splitlines()
    assert sum(line.startswith("inside the CUDA engine of model ") for line in lines) == 2
    assert sum(line.startswith("fc1, saved without it ") for line in lines) == 2
    shown = bench("show", tmp_path / "run.json")
    assert shown.exit_code == 0, shown.output
    assert "\n".join(lines) in shown.output


@IN_EMULATION
@pytest.mark.parametrize("spoil", [1.0, torch.nan], ids=["off", "nan"])
def test_an_engine_that_is_wrong_is_not_timed(
    spoil: float, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    reverse = CudaEngine.reverse

    def wrong(engine: CudaEngine, state: Any, *more: Any, **options: Any) -> None:
        reverse(engine, state, *more, **options)
        state.x.add_(spoil)

    monkeypatch.setattr(CudaEngine, "reverse", wrong)
    result, made = dry(tmp_path, "--cell", "afhq:1:unguided")
    assert result.exit_code == 1
    assert "1 of 1 checks failed" in result.output
    (cell,) = made["cells"]
    assert names(cell) == [BASELINE, TORCH, TRITON]
    assert "cuda" not in cell
    assert cell["check"]["reason"].startswith(f"cuda: {'differs by ' if spoil == 1.0 else 'NonFiniteError: '}")


@pytest.mark.parametrize("outcome", ["ok", "findings", "failed", "stopped"])
@pytest.mark.parametrize("name", ["plain", "racecheck"])
def test_what_the_sanitizer_says_is_the_verdict(
    name: str, outcome: str, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And an engine that cannot even run by itself takes no part: it could stop all."""
    run = {"name": name, "outcome": outcome, "seconds": 2.0, "tail": None if outcome == "ok" else ["and why"]}
    found = {"ok": outcome == "ok", "reason": None, "runs": [run]}
    monkeypatch.setattr(gpu, "run_sanitizer", lambda seconds: found)
    tests = {"name": "tests", "outcome": "1 passed, 0 failed", "seconds": 1.0, "tail": None}
    monkeypatch.setattr(gpu, "run_tests", lambda seconds: tests)
    monkeypatch.setattr(gpu, "cuda_missing", lambda device, dtype: None)
    monkeypatch.setattr(gpu, "_device", lambda dry: CPU)
    out = tmp_path / "run.json"
    result = bench("gpu", "--ml-tarflow", stand_in(tmp_path), "--out", out, "--budget", "1e-9")
    made = record.read(out)
    assert made["checks"] == [tests, run]
    assert (result.exit_code == 1) == (outcome != "ok"), result.output
    complaint = f"{name}: {outcome}\nand why"
    assert (complaint in result.output) == (outcome != "ok")
    assert f"{name}: {outcome} in 2 s" in SUITE.table(made).splitlines()
    why = "a small run of it went wrong"
    assert made["without_cuda"] == (why if name == "plain" and outcome != "ok" else None)


# The table


def test_the_inside_is_in_shares_of_a_step() -> None:
    times = {"step": 12e-6, "qkv, saved without it": 3e-6, "step of barriers and weights alone": 5e-6}
    parts = [{"name": name, "median": each, "p20": each, "p80": each} for name, each in times.items()]
    cuda = {"launches_per_pass": 2, "barriers_per_token": 10, "parts": parts}
    _, head, _, *lines = inside.lines({"label": {"model": "afhq", "batch": 1}, "cuda": cuda}, 1.0)
    assert head == "inside the CUDA engine of model afhq, batch 1; 10 barriers a token, 2 launches a pass"
    assert [re.split(r"  +", line) for line in lines] == [
        ["step", "12.00", "12.00-12.00", "100.0%"],
        ["qkv, saved without it", "3.00", "3.00-3.00", "25.0%"],
        ["step of barriers and weights alone", "5.00", "5.00-5.00", "41.7%"],
    ]


def test_an_engine_that_was_not_built_takes_no_part(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "cuda_missing", lambda device, dtype: "the CUDA engine was not built")
    _, made = dry(tmp_path, "--cell", "afhq:1:unguided")
    assert "cuda, left out: the CUDA engine was not built" in SUITE.table(made).splitlines()
    assert names(made["cells"][0]) == [BASELINE, TORCH, TRITON]
