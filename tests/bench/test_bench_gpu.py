"""`bench gpu`: its parts on a clock of their own or on small operations, and its dry run end to end."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import on_gpu
import pytest
import torch
from PIL import Image
from stand_in import bench, quick_limits, stand_in

from bench.common import record
from bench.common.harness import Rounds
from bench.suites.gpu import cells as gpu_cells
from bench.suites.gpu import inside
from bench.suites.gpu import suite as gpu
from bench.suites.gpu.cells import BASELINE, CASES, COMPILED, GUIDANCE, LOSS, SIZES, TORCH, TRITON, case_of
from bench.suites.gpu.suite import SUITE
from tarflow_fast import BackendError, TarFlow
from tarflow_fast.backend.cuda import engine as cuda_engine
from tarflow_fast.backend.pytorch.engine import TorchEngine
from tarflow_fast.backend.triton import profile
from tarflow_fast.engine import Condition

CPU, CELL = torch.device("cpu"), gpu_cells.cell


class KernelEngine(TorchEngine):
    """The torch backend, which says that it is made of kernels: two of a layer, in two layers, and one of the end."""

    launches_per_token = 5

    def operations(self, state: Any) -> list[Any]:
        layer = [("qkv", state.x.clone, 300), ("attention", state.z.clone, 100)]
        return [*layer, *layer, ("affine", state.x.clone, 10)]


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short measurements, one small test, no compiler, an engine with operations, no CUDA engine, and torch's images
    for those of the Triton engine, which the interpreter takes long for."""
    if torch.cuda.is_available():
        pytest.skip("a dry run is for the interpreter, and kernels are compiled here")
    quick_limits(monkeypatch)
    monkeypatch.setattr(profile, "LAUNCHES", 2)
    monkeypatch.setattr(gpu_cells, "BACKEND", "torch")
    passed = {"name": "tests", "outcome": "1 passed, 0 failed", "seconds": 2.0, "tail": None}
    monkeypatch.setattr(gpu, "run_tests", lambda seconds: passed)

    def engine(engine: Any, model: TarFlow, inputs: Any, rounds: Rounds) -> tuple[KernelEngine, Any]:
        made = KernelEngine(model.block_weights(0), device=CPU, dtype=torch.bfloat16, compile=False)
        return made, made.begin(inputs[0], Condition(inputs[1]))

    def no_native() -> Any:
        raise BackendError("the CUDA engine was not built")

    monkeypatch.setattr(gpu_cells, "cell", lambda compiled, **how: CELL(compiled=False, **how))
    monkeypatch.setattr(inside, "block_engine", engine)
    monkeypatch.setattr(cuda_engine, "load_native", no_native)


@pytest.fixture(autouse=True)
def _no_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up tests need none, and these take most of the time that a pytest of its own needs to start."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)  # options of plugins


def made_up_tests(folder: Path, *lines: str) -> Path:
    path = folder / "test_made_up.py"
    path.write_text("\n".join(lines))
    return path


def dry(checkout: Path, out: Path, *more: str) -> Any:
    return bench("gpu", "--dry", "--ml-tarflow", checkout, "--repeat", "2", "--out", out, *more)


def one_line(result: Any) -> str:
    return " ".join(result.output.replace("│", " ").split())


# Parts


def test_every_listed_cell_is_one_and_other_texts_are_none() -> None:
    cases = [case_of(text) for text in CASES]
    labels = [tuple(case.label.values()) for case in cases]
    assert len(set(labels)) == len(CASES)
    assert labels[0] == ("afhq", 16, "guided")
    assert set(labels) >= set(itertools.product(SIZES, (1, 4, 16), GUIDANCE))
    assert {what for *_, what in labels} == {*GUIDANCE, "loss"}
    for sizes, tokens in ((SIZES["afhq"], 1024), (SIZES["imagenet"], 1024)):
        assert (sizes.num_patches, sizes.channels, sizes.layers_per_block, sizes.num_blocks) == (tokens, 768, 8, 1)
    for text in ("afhq", "afhq:16", "afhq:0:guided", "afhq:x:guided", "dogs:1:guided", "afhq:1:sideways", "a:b:c:d"):
        with pytest.raises(ValueError, match=f"'{text}' is not MODEL:BATCH:PASS"):
            case_of(text)


def names(entry: dict[str, Any]) -> list[str]:
    return [run["name"] for run in entry["runs"]]


def test_operations_of_one_name_are_taken_together(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    sizes = {"a": 10, "b": 30}
    operations = [(name, lambda name=name: log.append(name), sizes[name]) for name in ("a", "b", "a")]
    engine = SimpleNamespace(reverse=lambda state: None, operations=lambda state: operations, launches_per_token=3)
    monkeypatch.setattr(inside, "block_engine", lambda *arguments: (engine, None))
    monkeypatch.setattr(profile, "empty_launches", lambda device: {})
    a, b = inside.measure_kernels(TarFlow(1, 4, 2, 64, 1, 1), (), Rounds(2, 10.0))["operations"]
    assert log == ["a", "a"] * 3 + ["b"] * 3  # warm, then twice
    assert (a["name"], a["bytes"], len(a["seconds"])) == ("a", 10, 2)
    assert b["bytes"] == 30


@pytest.mark.slow
def test_tests_are_counted_and_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made_up_tests(
        tmp_path, "import time", "def test_a(): pass", "def test_b(): assert 0", "def test_c(): assert 0"
    )
    monkeypatch.setattr(on_gpu, "FILES", (str(path),))
    found = on_gpu.run_tests(60.0)
    assert (found["passed"], found["failed"], found["ok"]) == (1, 2, False)
    assert "2 failed, 1 passed" in found["tail"][-1]
    other = tmp_path / "test_another.py"
    other.write_text("def test_d(): pass")
    monkeypatch.setattr(on_gpu, "FILES", (str(path), str(other)))
    both = on_gpu.run_tests(60.0)
    assert (both["passed"], both["failed"], both["ok"]) == (2, 2, False)
    assert "2 failed, 1 passed" in both["tail"][-1]  # of the one that failed
    monkeypatch.setattr(on_gpu, "FILES", (str(path),))
    made_up_tests(tmp_path, "import time", "def test_a(): time.sleep(60)")
    stopped = on_gpu.run_tests(0.5)
    assert not stopped["ok"]
    assert stopped["seconds"] < 30
    assert "stopped after" in stopped["tail"][-1]
    monkeypatch.setattr(on_gpu, "FILES", (str(tmp_path / "test_missing.py"),))
    assert not on_gpu.run_tests(60.0)["ok"]


@pytest.mark.parametrize("skipped", [True, False])
def test_a_file_may_be_skipped_but_not_be_without_tests(
    skipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip = ("import pytest", "pytest.skip('not built', allow_module_level=True)")
    monkeypatch.setattr(on_gpu, "FILES", (str(made_up_tests(tmp_path, *(skip if skipped else ()))),))
    found = on_gpu.run_tests(60.0)
    assert (found["passed"], found["failed"], found["ok"]) == (0, 0, skipped)


# The command


@pytest.mark.slow
def test_dry_run_end_to_end(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_cells, "BACKEND", "triton")
    out = tmp_path / "run.json"
    cells = ("--cell", "afhq:16:guided", "--cell", "afhq:1:unguided", "--cell", "afhq:16:loss")
    result = dry(stand_in(tmp_path), out, "--budget", "500", *cells)
    assert result.exit_code == 0, result.output
    made = record.read(out)
    assert made["settings"]["dry"] is True
    guided, unguided, density = made["cells"]
    assert guided["label"] == {"model": "afhq", "batch": 3, "pass": "guided"}
    for cell in (guided, unguided):
        assert names(cell) == [BASELINE, TORCH, TRITON]
        assert cell["engine"]["launches_per_token"] == 5
        assert [entry["name"] for entry in cell["engine"]["operations"]] == ["qkv", "attention", "affine"]
        assert [entry["name"] for entry in cell["engine"]["launches"]] == ["interpreter"]
    assert names(density) == [BASELINE, LOSS]
    assert "engine" not in density
    for cell in made["cells"]:
        assert cell["check"]["passed"]
        assert 0 < cell["check"]["max_error"] <= 2 * cell["check"]["tolerance"]
        for run in cell["runs"]:
            assert run["fraction_of_limit"] > 0
            assert len(run["seconds"]) == 2
            assert run["max_error"] <= cell["check"]["max_error"]
    text = SUITE.table(made)
    assert text in result.output
    lines = text.splitlines()
    assert lines[0].startswith("machine: DRY RUN on ")
    assert lines[2].startswith("copy bandwidth: ")
    assert "tests: 1 passed, 0 failed in 2 s" in lines
    assert "cuda, left out: the CUDA engine was not built" in lines
    assert sum(line.startswith("empty launch, interpreter ") for line in lines) == 2
    assert sum(line.startswith("kernels of model afhq") for line in lines) == 2
    picture = out.with_suffix(".png")
    with Image.open(picture) as image:
        image.verify()
    picture.unlink()
    shown = bench("show", out)
    assert shown.exit_code == 0, shown.output
    assert text in shown.output
    assert picture.is_file()
    assert str(tmp_path) not in out.read_text()


@pytest.mark.parametrize("spoil", ["far off", "nan"])
def test_a_wrong_baseline_leaves_no_time(tmp_path: Path, quick: None, spoil: str) -> None:
    out = tmp_path / "run.json"
    cells = ("--cell", "afhq:2:unguided", "--cell", "afhq:2:loss")
    result = dry(stand_in(tmp_path, spoil), out, "--skip-tests", *cells)
    assert result.exit_code == 1
    assert "2 of 2 checks failed" in result.output
    assert all(not cell["runs"] for cell in record.read(out)["cells"])
    assert sum("FAILED" in line for line in result.output.splitlines()) == 2


def test_failed_tests_are_told_and_cells_measured(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = {"name": "tests", "outcome": "1 passed, 1 failed", "seconds": 2.0, "tail": ["of the log"]}
    monkeypatch.setattr(gpu, "run_tests", lambda seconds: failed)
    out = tmp_path / "run.json"
    result = dry(stand_in(tmp_path), out, "--cell", "afhq:2:loss")
    assert result.exit_code == 1
    assert "\ntests: 1 passed, 1 failed in 2 s\n" in result.output
    assert "\nFAILED tests: 1 passed, 1 failed\nof the log\n" in result.output
    assert names(record.read(out)["cells"][0]) == [BASELINE, LOSS]


def test_what_cannot_be_done_costs_nothing_else(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("out of memory\nand a page of advice")

    monkeypatch.setattr(KernelEngine, "operations", broken)
    monkeypatch.setattr(gpu_cells, "loss_and_norm", broken)
    out = tmp_path / "run.json"
    cells = ("--cell", "afhq:2:loss", "--cell", "afhq:2:unguided")
    result = dry(stand_in(tmp_path), out, "--skip-tests", *cells)
    assert result.exit_code == 1
    made = record.read(out)
    density, sampling = made["cells"]
    assert density["runs"] == []
    assert density["check"]["reason"] == "RuntimeError: out of memory"
    assert names(sampling) == [BASELINE, TORCH, TRITON]
    assert made["failures"] == ["inside triton: RuntimeError: out of memory"]
    assert result.output.count("RuntimeError: out of memory\n") == 3  # in the table, and at the end


def test_what_the_budget_does_not_allow_is_listed(tmp_path: Path, quick: None) -> None:
    out = tmp_path / "run.json"
    result = dry(stand_in(tmp_path), out, "--skip-tests", "--budget", "1e-9")
    assert result.exit_code == 0, result.output
    made = record.read(out)
    assert made["cells"] == []
    assert made["not_run"] == list(CASES)
    assert SUITE.table(made).count("not run, as there was no time: ") == len(CASES)
    assert bench("show", out).exit_code == 0


def test_a_run_that_is_stopped_leaves_what_it_has(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    done: Iterator[int] = iter(range(1))
    measure: Any = type(SUITE).measure

    def one_cell(suite: Any, case: Any) -> Any:
        if next(done, None) is None:
            raise KeyboardInterrupt
        return measure(suite, case)

    monkeypatch.setattr(type(SUITE), "measure", one_cell)
    out = tmp_path / "run.json"
    assert dry(stand_in(tmp_path), out, "--skip-tests", "--cell", "afhq:1:loss", "--cell", "afhq:2:loss").exit_code
    assert len(record.read(out)["cells"]) == 1
    assert bench("show", out).exit_code == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do(tmp_path: Path) -> None:
    result = bench("gpu", "--ml-tarflow", stand_in(tmp_path), "--out", tmp_path / "run.json")
    assert result.exit_code == 1
    assert result.output.startswith("Error: there is no GPU to measure: ")
    assert "--dry" in result.output


def test_a_dry_run_wants_the_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = dry(stand_in(tmp_path), tmp_path / "run.json")
    assert result.exit_code == 1
    assert "set TRITON_INTERPRET=1" in one_line(result)


def test_a_wrong_cell_is_wrong_usage(tmp_path: Path) -> None:
    result = dry(stand_in(tmp_path), tmp_path / "run.json", "--cell", "afhq:16")
    assert result.exit_code == 2
    assert "MODEL:BATCH:PASS" in one_line(result)


@pytest.mark.slow
def test_every_cell_dry_with_the_compiled_backend(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_cells, "cell", CELL)
    out = tmp_path / "run.json"
    result = dry(stand_in(tmp_path), out, "--skip-tests")
    assert result.exit_code == 0, result.output
    cells = record.read(out)["cells"]
    assert len(cells) == len(CASES)
    assert [COMPILED in names(cell) for cell in cells].count(True) == 2
