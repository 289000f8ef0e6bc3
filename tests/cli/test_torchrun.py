"""Real processes of torchrun share one `sample`, `fid`, `prepare-stats` and `tune`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import random_model
from PIL import Image
from runs import free_port

from tarflow_fast.checkpoints import save
from tarflow_fast.evaluation import read_statistics

pytestmark = pytest.mark.slow

COMMAND = """
import sys
import torch
from tarflow_fast import evaluation
from tarflow_fast.cli import main

class Small:
    name, device = "small", torch.device("cpu")

    def __init__(self, weights=None, *, device="cpu"):
        pass

    def __call__(self, images):
        return self.features(images).pooled

    def features(self, images):
        x = images.float() / 255
        pooled = torch.cat([x.mean((2, 3)), x.amax((2, 3)), x.square().mean((2, 3))], 1)
        return evaluation.Features(pooled, x[:, :, :2, :2].flatten(1), 4 * pooled)

evaluation.Inception = Small
main(sys.argv[1:])
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("command.py").write_text(COMMAND)
    save(random_model(in_channels=3, num_classes=3), "m.safetensors")
    Path("d").mkdir()
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (1100, 8, 8, 3), dtype=np.uint8)):
        Image.fromarray(image).save(f"d/{i:04d}.png")
    return tmp_path


def run(*args: object, processes: int = 0) -> str:
    how = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", free_port()]
    plain = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    line = [sys.executable, *(how if processes else []), "command.py", *map(str, args)]
    done = subprocess.run(line, env={**plain, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_images_and_their_fid(folder: Path) -> None:
    """Shards of two processes are those of one, to the byte, and so is the distance, which one of them prints."""
    run("prepare-stats", "d", "--size", 8, "--out", "one.npz")
    shared = run("prepare-stats", "d", "--size", 8, "--out", "two.npz", "--features", "f", processes=2)
    assert shared.count("two.npz") == 1
    one, two = read_statistics("one.npz"), read_statistics("two.npz")
    assert np.allclose(one.mean, two.mean, rtol=1e-9, atol=0)
    assert np.allclose(one.covariance, two.covariance, rtol=1e-9, atol=1e-15)
    how = ("-m", "m.safetensors", "-n", 60, "--shard-size", 8, "--batch-size", 8, "--solver", "sequential", "--quiet")
    run("sample", *how, "--out", "a")
    run("sample", *how, "--out", "b", processes=2)
    shards = sorted(path.name for path in Path("a").glob("*.npz"))
    assert len(shards) == 8
    assert all((Path("a") / name).read_bytes() == (Path("b") / name).read_bytes() for name in shards)
    for path, size in (("a", ()), ("d", ("--size", 8))):
        line = ("fid", path, *size, "--stats", "one.npz", "--json")
        whole, parts = json.loads(run(*line)), json.loads(run(*line, "--features", f"g-{path}", processes=2))
        assert (parts["fid"], parts["images"]) == (pytest.approx(whole["fid"], rel=1e-9, abs=1e-9), whole["images"])


def test_tuning(folder: Path) -> None:
    run("prepare-stats", "d", "--size", 8, "--out", "s.npz")
    how = ("-m", "m.safetensors", "--stats", "s.npz", "-n", 40, "--guidance", "0,1", "--solver", "sequential", "--json")
    alone, shared = (json.loads(run("tune", *how, "--features", f"t{n}", processes=n)) for n in (0, 2))
    assert [each["fid"] for each in shared["points"]] == pytest.approx(
        [each["fid"] for each in alone["points"]], rel=1e-9
    )
