"""Tests of the command line run it in a folder of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import random_model
from click.testing import CliRunner, Result
from command_lines import NAMES as CLASSES
from command_lines import NOISE
from sample_runs import NAMES, Run

import tarflow_fast as tff
from tarflow_fast.cli import main


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `tarflow-fast sample` in a folder with a model of three classes and a latent one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TARFLOW_FAST_TRACEBACK", raising=False)
    model = random_model(num_classes=3, img_size=4)
    model.metadata = {"noise_type": "gaussian", "noise_std": 0.1, "class_names": NAMES}
    tff.save(model, "m.safetensors")
    tff.save(random_model(in_channels=4, img_size=4), "latent.safetensors")

    def run(*arguments: object, model: str = "m.safetensors", code: int = 0) -> Result:
        line = ["sample", "-m", model, "--solver", "sequential", *map(str, arguments)]
        result = CliRunner().invoke(main, line, prog_name="tarflow-fast")
        assert result.exit_code == code, result.output
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result

    return run


@pytest.fixture
def command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line in an empty folder that has a model of three classes and one of none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TARFLOW_FAST_TRACEBACK", raising=False)
    model = random_model(num_classes=3)
    model.metadata = {"noise_type": "gaussian", "noise_std": NOISE, "class_names": CLASSES}
    tff.save(model, "m.safetensors")
    tff.save(random_model(in_channels=3), "plain.pth")

    def run(*arguments: object, code: int = 0) -> Result:
        result = CliRunner().invoke(main, [str(a) for a in arguments], prog_name="tarflow-fast")
        assert result.exit_code == code, result.output
        assert result.exception is None or isinstance(result.exception, SystemExit)
        if code == 1:
            assert result.stdout == ""
            assert result.stderr.startswith("Error: ")
            assert result.stderr.count("\n") == 1
        return result

    return run
