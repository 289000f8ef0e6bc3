"""The commands serve models of other families: train, eval, sample, info and flows."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from command_lines import picture

from tarflow_fast.cli import main
from tarflow_fast.flows import FAMILIES, FamilyFlow, build, save

Run = Callable[..., Result]
STEPS = ("--epochs", 1, "--batch-size", 2000, "--warmup-steps", 1, "--log-every", 5, "--threads", 1)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TARFLOW_FAST_TRACEBACK", raising=False)

    def run(*arguments: object, code: int = 0) -> Result:
        result = CliRunner().invoke(main, list(map(str, arguments)), prog_name="tarflow-fast")
        assert result.exit_code == code, result.output
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result

    return run


def train(run: Run, *more: object, code: int = 0) -> Result:
    options = ("--flow", "realnvp", "--data", "moons", "--option", "couplings=2", "--option", "hidden=8,8")
    return run("train", *options, *STEPS, "--out", "run", *more, code=code)


def test_a_family_goes_through_all_commands(run: Run) -> None:
    assert "held-out log prob" in train(run).stderr
    model = os.path.join("run", "model.safetensors")
    score = json.loads(run("eval", "-m", model, "--data", "moons", "--limit", 500, "--json").stdout)
    assert score["samples"] == 500
    assert -6 < score["log_prob"] < -1
    assert score["bits_per_dim"] is None
    lines = run("eval", "-m", model, "--data", "moons", "--limit", 500).stdout
    assert f"log p           {score['log_prob']:.4f}" in lines
    assert "reconstruction" in lines
    facts = json.loads(run("sample", "-m", model, "-n", 300, "--npz", "x.npz", "--json").stdout)
    assert facts["files"] == {"picture": "samples.png", "npz": "x.npz"}
    assert picture("samples.png").shape == (384, 776, 3)
    with np.load("x.npz") as file:
        assert file["samples"].shape == (300, 2)
    assert "family: realnvp, of samples of shape 2" in run("info", model).stdout
    told = json.loads(run("info", model, "--json").stdout)["model"]
    assert told["options"]["hidden"] == [8, 8]
    assert told["metadata"]["steps"] == 10


def test_a_run_goes_on_under_its_own_options(run: Run) -> None:
    train(run)
    assert run("train", "--resume", "--out", "run", "--epochs", 2, "--quiet").stdout == ""
    assert json.loads(run("info", "run/model.safetensors", "--json").stdout)["model"]["metadata"]["steps"] == 20
    more = ("--flow", "realnvp", "--option", "couplings=3")
    assert "couplings" in run("train", "--resume", "--out", "run", *more, code=2).output


def test_tokens_are_written_as_text(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("nice", data_shape=(4,), couplings=1, hidden=(2,))
    model.metadata = {"kind": "tokens", "symbols": list("abc")}
    save(model, "t.safetensors")

    def sample(model: FamilyFlow, n: int, y: None = None, *, generator: torch.Generator | None = None) -> torch.Tensor:
        return torch.arange(4 * n).reshape(n, 4) % 3

    monkeypatch.setattr(type(model), "sample", sample)
    lines = run("sample", "-m", "t.safetensors", "-n", 2, "--npz", "t.npz").stdout.splitlines()
    assert lines[0].startswith("t.npz: 2 samples of nice")
    assert lines[1:] == ["abca", "bcab"]


def test_labels_choose_the_classes(run: Run) -> None:
    model = build("nice", data_shape=(1, 4, 4), num_classes=3, couplings=1, hidden=(2,))
    model.metadata = {"class_names": ["cat", "dog", "owl"]}
    save(model, "m.safetensors")
    run("sample", "-m", "m.safetensors", "-n", 6, "--labels", "dog,0", "--npz", "x.npz", "--no-grid")
    with np.load("x.npz") as file:
        assert file["labels"].tolist() == [1, 0, 1, 0, 1, 0]
    run("sample", "-m", "m.safetensors", "--seed", 3)
    height, width = picture("samples.png").shape  # three columns of eight grey images
    assert height > 2 * width
    assert "there is no class 'cow'" in run("sample", "-m", "m.safetensors", "--labels", "cow", code=2).output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train", "--flow", "glew", "--data", "moons", "--out", "r"), "--flow: expected one of nice"),
        (("train", "--data", "moons", "--option", "a=1", "--out", "r"), "--option goes with --flow"),
        (("train", "--data", "moons", "--no-logit", "--out", "r"), "--logit goes with --flow"),
        (("train", "--flow", "nice", "--option", "a", "--data", "moons", "--out", "r"), "expected NAME=VALUE, got 'a'"),
        (("train", "--flow", "nice", "--option", "a=1", "--data", "moons", "--out", "r"), "--option: expected one of"),
        (("train", "--flow", "nice", "--blocks", 3, "--data", "moons", "--out", "r"), "--blocks: expected 8, its"),
        (("train", "--flow", "nice", "--data", "dna", "--out", "r"), "--data: expected vectors or images"),
        (("eval", "-m", "m.safetensors", "--data", "moons", "--accuracy"), "--accuracy is for TarFlow"),
        (("sample", "-m", "m.safetensors", "--guidance", 2), "--guidance is for TarFlow"),
        (("sample", "-m", "m.safetensors", "--first", 2), "--first is for TarFlow"),
        (("sample", "-m", "m.safetensors"), "nothing is left to write: give --npz"),
        (("sample", "-m", "m.safetensors", "-o", "x.png"), "--out: these samples make no picture"),
        (("flows", "glew"), "expected one of nice"),
    ],
    ids=lambda value: "-".join(map(str, value[:3])) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_is_told_in_flags(run: Run, arguments: tuple[object, ...], said: str) -> None:
    save(build("nice", data_shape=(3,), couplings=1, hidden=(2,)), "m.safetensors")
    result = CliRunner().invoke(main, list(map(str, arguments)), prog_name="tarflow-fast")
    assert result.exit_code in (1, 2)
    assert said in result.output
    assert not Path("r").exists() or not list(Path("r").glob("*.safetensors"))


def test_families_and_demonstrations_are_listed(run: Run) -> None:
    text = run("flows").stdout
    for word in ("realnvp", "moons", "Families", "Demonstrations"):
        assert word in text
    assert "  hidden = 64,64" in run("flows", "realnvp").stdout.splitlines()
    for name in FAMILIES:
        options = json.loads(run("flows", name, "--json").stdout)["options"]
        assert options
        assert all(each["meaning"].endswith(".") for each in options.values()), name
    assert "nice" in json.loads(run("flows", "--json").stdout)["families"]
