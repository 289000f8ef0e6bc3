"""`tarflow-fast tune`: the curve as a table, as JSON and as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import random_model
from command_lines import Run
from torch import Tensor

import tarflow_fast as tff
from tarflow_fast.evaluation import Gaussian, read_statistics, tune


class Small:
    """A small extractor in the place of Inception-v3."""

    name = "small"

    def __init__(self, weights: Any = None, *, device: Any = "cpu"):
        pass

    def __call__(self, images: Tensor) -> Tensor:
        x = images.float() / 255
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)


@pytest.fixture
def run(command_line: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr("tarflow_fast.evaluation.Inception", Small)
    Gaussian(torch.full((2,), 0.4).double(), 0.1 * torch.eye(2).double()).save("s.npz")
    Gaussian(torch.full((6,), 0.4).double(), 0.1 * torch.eye(6).double()).save("s6.npz")
    return command_line


def test_the_curve(run: Run) -> None:
    pytest.importorskip("matplotlib")
    line = ("tune", "-m", "m.safetensors", "--stats", "s.npz", "-n", 12, "--labels", "0,2", "--solver", "sequential")
    line += ("--guidance", "0, 1.5", "--denoise-scale", "0,1,1.2", "--seed", 3, "--annealed-guidance")
    facts = json.loads(run(*line, "--out", "curve.json", "--plot", "curve.png", "--json").stdout)
    who = tff.Sampler(tff.load("m.safetensors"), solver="sequential")
    how: dict[str, Any] = {"seed": 3, "annealed_guidance": True}
    points = tune(
        who, Small(), read_statistics("s.npz"), 12, [0, 2], guidance=[0.0, 1.5], denoise_scale=[0.0, 1.0, 1.2], **how
    )
    assert [(p["guidance"], p["denoise_scale"], p["fid"]) for p in facts["points"]] == [
        (p.guidance, p.denoise_scale, pytest.approx(p.fid, rel=1e-9)) for p in points
    ]
    assert facts["best"]["fid"] == min(p["fid"] for p in facts["points"])
    assert facts["best"] in facts["points"]
    assert facts.pop("seconds") > 0
    assert json.loads(Path("curve.json").read_text()) == facts
    assert Path("curve.png").read_bytes()[:4] == b"\x89PNG"
    lines = run(*line).stdout.splitlines()
    assert lines[1].split() == ["0", "1", "1.2"]
    assert lines[3].split() == ["1.5", *(f"{p.fid:.3f}" for p in points[3:])]
    assert lines[4].startswith("best: --guidance ")
    assert run(*line, "--quiet").output == ""


def test_what_a_model_records_is_the_default(run: Run) -> None:
    line = ("--stats", "s6.npz", "-n", 4, "--guidance", "0", "--solver", "sequential", "--json")
    unknown = json.loads(run("tune", "-m", "plain.pth", *line).stdout)
    assert [p["denoise_scale"] for p in unknown["points"]] == [0]
    assert unknown["labels"] is None
    line = ("-m", "m.safetensors", "--stats", "s.npz", "-n", 4, "--solver", "sequential", "--json")
    known = json.loads(run("tune", *line, "--guidance", 1).stdout)
    assert [p["denoise_scale"] for p in known["points"]] == [0.8, 1, 1.2]
    assert "random" in known["labels"]
    model = tff.load("m.safetensors")
    model.metadata["sampling"] = {"guide_what": "a", "annealed_guidance": True}
    tff.save(model, "records.safetensors")
    line = ("--guidance", 1, *line[2:])
    one = run("tune", "-m", "m.safetensors", "--guide-what", "a", "--annealed-guidance", *line).stdout
    two = run("tune", "-m", "records.safetensors", *line).stdout
    assert json.loads(one)["points"] == json.loads(two)["points"] != known["points"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((), 2, "Missing option '--stats'"),
        (("--stats", "none.npz"), 1, "'none.npz': no such file"),
        (("--stats", "s.npz", "--guidance", "1,x"), 2, "'x' is not a valid float range"),
        (("--stats", "s.npz", "--guidance", "1,-1"), 2, "-1.0 is not in the range"),
        (("--stats", "s.npz", "--guidance", "1,1"), 2, "--guidance: expected at least one number, none of them twice"),
        (("--stats", "s.npz", "--guidance", "0", "--attn-temp", 2), 2, "--attn-temp: expected the default"),
        (("--stats", "s.npz", "--out", "a.txt"), 2, "--out: expected a file name ending in .json"),
        (("--stats", "s.npz", "--plot", "a.jpg"), 2, "--plot: expected a file name ending in .png"),
    ],
)
def test_refusals(run: Run, options: tuple[object, ...], code: int, message: str) -> None:
    assert message in " ".join(run("tune", "-m", "m.safetensors", *options, code=code).stderr.split())


@pytest.mark.parametrize(
    "line", [("tune", "--stats", "s.npz"), ("sample", "--shards", "features", "--out", "drawn", "-n", 2)], ids=str
)
def test_models_of_no_pictures_are_refused(run: Run, line: tuple[object, ...]) -> None:
    tff.save(random_model(in_channels=4, img_size=4, patch_size=2), "latent.safetensors")
    said = run(*line, "-m", "latent.safetensors", code=2).stderr
    wanted = "--model: expected a model of pictures, of which Inception-v3 has features, got images of 4 channels"
    assert wanted in " ".join(said.split())
    assert not Path("drawn").exists()
