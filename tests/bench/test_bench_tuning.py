"""`bench tuning`: the suite from end to end on a few small images, and what its picture shows."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stand_in import bench

from bench.common import record
from bench.suites.tuning import SUITE, Extractor


def write_idx(path: Path, values: np.ndarray) -> None:
    head = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    path.write_bytes(gzip.compress(head + values.tobytes()))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data set in Fashion-MNIST's files, whose classes are levels of grey."""
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for name, count in (("train", 300), ("t10k", 40)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = (20 * labels[:, None, None] + rng.integers(0, 20, (count, 28, 28))).astype(np.uint8)
        write_idx(tmp_path / "data" / f"{name}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / "data" / f"{name}-labels-idx1-ubyte.gz", labels)
    return tmp_path / "data"


@pytest.mark.slow
def test_the_classifier_learns() -> None:
    labels = torch.arange(512) % 10
    noise = torch.randint(20, (512, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    images = (20 * labels[:, None, None, None] + noise).to(torch.uint8)
    torch.manual_seed(0)
    extractor = Extractor()
    extractor.learn(images, labels, 12)
    assert extractor.eval().accuracy(images, labels) > 0.5
    assert extractor(images[:3]).shape == (3, 64)


def test_end_to_end(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    weights = ("--guidance", 0, "--guidance", 1.5, "--rate", 0, "--rate", 1)
    result = bench("tuning", "--data", data, "--count", 20, "--epochs", 1, *weights, "--threads", 1, "--out", out)
    assert result.exit_code == 0, result.output
    made = record.read(out)
    points = [(p["guidance"], p["denoise_scale"]) for cell in made["cells"] for p in cell["points"]]
    assert points == [(0, 0), (0, 1), (1.5, 0), (1.5, 1)]
    assert made["extractor"]["reference_images"] == 300
    assert SUITE.table(made) in result.output
    (axes,) = SUITE.figure(made).axes
    drawn = [list(line.get_ydata()) for line in axes.lines[:2]]
    assert drawn == [[cell["points"][i]["fid"] for cell in made["cells"]] for i in range(2)]
    with Image.open(out.with_suffix(".png")) as image:
        image.verify()
