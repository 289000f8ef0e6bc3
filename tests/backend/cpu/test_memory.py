"""What the native CPU engine takes of memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import TESTS, random_model
from cpu_engines import engine_of

import tarflow_fast as tff


def test_packed_weights_take_no_more_than_the_weights() -> None:
    model = random_model(channels=128, img_size=14, layers_per_block=2)
    count = sum(value.numel() for name, value in model.block_weights(0).layers[0].__dict__.items())
    for dtype in (torch.float32, torch.bfloat16):
        assert engine_of(model, 0, dtype).packed_bytes <= 1.1 * 2 * count * dtype.itemsize + 2**16


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux tells the peak")
@pytest.mark.parametrize("sizes", [(32, 64, 4, 2, 160), (16, 512, 8, 1, 1)], ids=["large batch", "large block"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.slow
def test_peak_memory(dtype: str, sizes: tuple[int, ...]) -> None:
    """Making a sampler and drawing takes the packed weights, one KV cache, and at most 64 MB."""
    code = f"""
import sys, torch
sys.path[:0] = sys.argv[1:]
from cases import random_model
from tarflow_fast.sampling.sampler import Sampler

def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

img_size, channels, layers, blocks, batch = {sizes}
model = random_model(img_size=img_size, channels=channels, layers_per_block=layers, num_blocks=blocks)
model = model.to(torch.{dtype})
open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here on
before = kilobytes("VmRSS")
sampler = Sampler(model, backend="cpu", dtype=torch.{dtype})
report = sampler.sample(batch).report
taken = (kilobytes("VmHWM") - before) * 1024
packed = sum(engine.packed_bytes for engine in sampler.engines)
assert packed + report.cache_bytes > 40e6
print(taken - packed - report.cache_bytes)
"""
    arguments = [sys.executable, "-W", "ignore", "-c", code, str(TESTS)]
    done = subprocess.run(arguments, timeout=120, check=True, capture_output=True, text=True)
    assert int(done.stdout) <= 64e6


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux tells the peak")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.slow
def test_peak_memory_of_a_model_and_its_sampler(tmp_path: Path, dtype: str) -> None:
    """Loading a model and making a sampler of it takes its tensors, and at most 1.2 times the packed weights."""
    path = tmp_path / "m.safetensors"
    tff.save(random_model(img_size=8, channels=512, layers_per_block=3, num_blocks=4), path)
    code = f"""
import sys, torch, tarflow_fast as tff
from tarflow_fast.sampling import Sampler

def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

Sampler(tff.TarFlow(1, 4, 2, 64, 1, 1), backend="cpu")  # what is done once
open("/proc/self/clear_refs", "w").write("5")
before = kilobytes("VmRSS")
model = tff.load(sys.argv[1])
sampler = Sampler(model, backend="cpu", dtype=torch.{dtype})
taken = (kilobytes("VmHWM") - before) * 1024
tensors = sum(value.nbytes for value in model.state_dict().values())
packed = sum(engine.packed_bytes for engine in sampler.engines)
assert tensors > 100e6
print(taken / (tensors + 1.2 * packed))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(path)], timeout=120, check=True, capture_output=True, text=True
    )
    assert float(done.stdout) <= 1
