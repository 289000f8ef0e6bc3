"""`bench density`: the work it counts, what it checks, and the suite from end to end with torch in both places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from stand_in import bench, quick_limits, wrong_density

from bench.common import machine, record, roofline
from bench.common.harness import admit_all
from bench.common.models import MODELS
from bench.suites import density
from bench.suites.density import SUITE, TOLERANCE, case_of, ready
from tarflow_fast import TarFlow
from tarflow_fast.backend.cpu.engine import cpu_missing

native = pytest.mark.skipif(cpu_missing() is not None, reason=str(cpu_missing()))


def run(out: Path, *more: str) -> Any:
    sizes = ("--batch", "2", "--threads", "1", "--repeat", "2")
    return bench("density", "--model", "tiny", *sizes, "--out", out, *more)


def test_denoising_work_is_what_counting_product_by_product_gives() -> None:
    sizes = MODELS["tiny"]
    model = density.model_of("tiny", 0)
    skipped = ("pos_embed", "class_embed")
    weights = [value for name, value in model.named_parameters() if not name.endswith(skipped)]
    flops = 0
    for i in range(sizes.num_patches):
        flops += sum(2 * 2 * 3 * value.numel() for value in weights if value.dim() == 2)  # forward, and back
        one = sizes.num_blocks * sizes.layers_per_block * 3 * 2 * sizes.channels * (i + 1)
        flops += 6 * one  # q kᵀ, p v; then the gradients of q, k, p and v
    work = roofline.denoise_work(sizes, 3)
    values = 3 * sizes.num_patches * sizes.token_dim
    assert work.flops == flops
    assert work.bytes == 4 * (2 * sum(value.numel() for value in weights) + 3 * values)


def test_what_is_compared_does_not_depend_on_the_size_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(density, "denoise", lambda model, images, y, **how: images + 0.25)
    moved = ready(case_of("tiny", "denoise", 2), 0, "torch", torch.float32)()
    assert torch.allclose(moved, torch.full_like(moved, 0.25))
    monkeypatch.setattr(TarFlow, "log_prob", lambda model, images, y: torch.tensor([64.0, -128.0]))
    log_p = ready(case_of("tiny", "log_prob", 2), 0, "torch", torch.float32)()
    assert log_p.tolist() == [1.0, -2.0]  # 8×8 values


def test_fp32_is_held_to_torch_and_bf16_to_its_error() -> None:
    zero = torch.zeros(3)

    def passed(torch_off: float, cpu_off: float, **how: Any) -> bool:
        candidates = {"torch": lambda: lambda: zero + torch_off, "cpu": lambda: lambda: zero + cpu_off}
        return admit_all(candidates, **how)[1]["passed"]

    half = {"exact": zero, "yardstick": ("torch", torch.bfloat16)}
    assert passed(0, 0.9 * TOLERANCE, tolerance=TOLERANCE)
    assert not passed(0, 1.1 * TOLERANCE, tolerance=TOLERANCE)
    assert passed(0.1, -0.19, **half)
    assert not passed(0.1, 0.21, **half)


@native
def test_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick_limits(monkeypatch)
    threads, out = torch.get_num_threads(), tmp_path / "run.json"
    result = run(out)
    assert result.exit_code == 0, result.output
    assert torch.get_num_threads() == threads
    made = record.read(out)
    labels = [(cell["label"]["operation"], cell["label"]["dtype"]) for cell in made["cells"]]
    assert labels == [(o, d) for o in ("log_prob", "denoise") for d in ("float32", "bfloat16")]
    for cell in made["cells"]:
        assert cell["check"]["passed"]
        assert [run["name"] for run in cell["runs"]] == ["torch", "cpu"]
        assert all(run["fraction_of_limit"] > 0 for run in cell["runs"])
        rate = made["limits"][f"{cell['label']['dtype']}_flops_per_second_1"]
        bandwidth = made["limits"]["read_bandwidth_1"]
        known = {entry["bytes"]: entry["bytes_per_second"] for entry in bandwidth}[cell["work"]["working_set"]]
        limit = max(cell["work"]["flops"] / rate, cell["work"]["bytes"] / known)
        assert cell["limit"]["seconds"] == pytest.approx(limit)
    assert SUITE.table(made) in result.output
    assert "bfloat16 flops per second, 1 thread: " in result.output
    with Image.open(out.with_suffix(".png")) as image:
        image.verify()
    log_prob, denoise = SUITE.figure(made).axes
    assert [bar.get_height() for bar in denoise.patches] == [c["runs"][1]["ratio"]["median"] for c in made["cells"][2:]]
    assert len(log_prob.patches) == 2
    assert str(machine.ROOT) not in out.read_text()


@native
def test_a_wrong_gradient_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick_limits(monkeypatch)
    wrong_density(monkeypatch, 2 * TOLERANCE)
    out = tmp_path / "run.json"
    result = run(out, "--dtype", "float32")
    assert result.exit_code == 1
    assert "1 of 2 checks failed" in result.output
    log_prob, denoise = record.read(out)["cells"]
    assert log_prob["runs"]
    assert not denoise["runs"]
