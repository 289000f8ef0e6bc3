"""Fifty thousand images take no more memory than a hundred do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="/proc")]

COMMAND = """
import sys
from pathlib import Path
import torch
import tarflow_fast as tff
from cases import random_model
from tarflow_fast.evaluation import Features, FeatureSums, compute_features, feature_format, open_images
from tarflow_fast.sampling.sharded import draw_shards

class Small:
    name, device = "small", torch.device("cpu")

    def features(self, images):
        x = images.float() / 255
        pooled = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)
        return Features(pooled, x[:, :, :2, :2].flatten(1), pooled)

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

n, out = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
sampler = tff.Sampler(random_model(img_size=8, in_channels=3), solver="sequential", threads=1)
draw_shards(sampler, out + "/images", n, shard_size=100, batch_size=100)
print(peak())
source, sums = open_images(out + "/images"), None
for found in compute_features(source.batches(64), Small()):
    sums = sums or FeatureSums(found.pooled.shape[1])
    sums.add(found.pooled)
assert sums.n == n
print(peak())
draw_shards(sampler, out + "/features", n, shard_size=100, batch_size=100, format=feature_format(Small()))
print(peak())
"""


def peaks(n: int, out: Path) -> list[int]:
    """Returns the peak, in KiB, after images are drawn, their features summed up, and features drawn from the model."""
    paths = [str(path) for path in (Path(__file__).parents[1], Path(__file__).parents[2])]
    line = [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{COMMAND}", str(n), str(out)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [int(each) for each in done.stdout.split()]


def test_peak_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    few, many = peaks(100, tmp_path / "few"), peaks(50_000, tmp_path / "many")
    grown = [b - a for a, b in zip(few, many, strict=True)]
    print(f"KiB, n = 100: {few}, n = 50,000: {many}")
    assert max(grown) < 6 * 1024  # all images would take 9.6 MB, and four times as much as floats
