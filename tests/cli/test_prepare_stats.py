"""`tarflow-fast prepare-stats`: the statistics of a folder, which `fid --stats` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_lines import Run
from PIL import Image
from torch import Tensor

from tarflow_fast.data import centre_crops, find_below
from tarflow_fast.evaluation import Features, read_spatial_statistics, read_statistics


class Small:
    """A small extractor in the place of Inception-v3."""

    device, name = torch.device("cpu"), "small"

    def __init__(self, weights: Any = None, *, device: Any = "cpu"):
        self.network = torch.nn.Linear(2, 1)

    def features(self, images: Tensor) -> Features:
        x = images.float() / 255
        return Features(x.mean((2, 3)), x.amax((2, 3)), x.std((2, 3)))


@pytest.fixture
def run(command_line: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr("tarflow_fast.evaluation.Inception", Small)
    rng = np.random.default_rng(0)
    Path("data/a").mkdir(parents=True)
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (12, 9 + i, 3), dtype=np.uint8)).save(f"data/a/{i}.png")
    return command_line


def test_statistics_of_a_folder(run: Run) -> None:
    text = run("prepare-stats", "data", "--size", 8, "--out", "stats.npz", "--batch-size", 7).stdout
    assert text.startswith("stats.npz: statistics of 20 images of 8×8  (")
    images = torch.from_numpy(np.stack(list(centre_crops(find_below("data"), 8, range(20)))))
    features = Small().features(images)
    for found, wanted in (
        (read_statistics("stats.npz"), features.pooled),
        (read_spatial_statistics("stats.npz"), features.spatial),
    ):
        assert found is not None
        np.testing.assert_allclose(found.mean, wanted.double().mean(0), rtol=1e-9)
        np.testing.assert_allclose(found.covariance, np.cov(wanted.double().T), rtol=1e-9, atol=1e-12)
    facts = json.loads(run("prepare-stats", "data", "--size", 8, "--out", "again.npz", "--seed", 1, "--json").stdout)
    assert (facts["images"], facts["size"], facts["seed"], facts["saved"]) == (20, 8, 1, "again.npz")
    assert run("prepare-stats", "data", "--size", 8, "-o", "again.npz", "--quiet").output == ""
    assert json.loads(run("fid", "data", "--size", 8, "--stats", "stats.npz", "--json").stdout)["fid"] >= 0


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("data", "--out", "a.npz"), 2, "Missing option '--size'"),
        (("data", "--size", 8, "--out", "a.txt"), 2, "--out: expected a file name ending in .npz or .pth"),
        (("none", "--size", 8, "--out", "a.npz"), 1, "'none': no such folder"),
        (("one", "--size", 8, "--out", "a.npz"), 1, "DATA: expected at least two"),
    ],
)
def test_refusals(run: Run, options: tuple[object, ...], code: int, message: str) -> None:
    Path("one").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save("one/a.png")
    assert message in " ".join(run("prepare-stats", *options, code=code).stderr.split())
    assert not Path("a.npz").exists()
