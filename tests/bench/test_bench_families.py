"""`bench families`: which families meet which data, how long they are trained, and the suite from end to end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from stand_in import bench
from torch import Tensor

from bench.common import record
from bench.suites import families
from bench.suites.families import SUITE, fit, pack, unpack
from tarflow_fast.data import FlowData, load_flow_data
from tarflow_fast.flows import FAMILIES, FamilyFlow, build
from tarflow_fast.flows.nice import NICE

pytest.importorskip("sklearn")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.common.harness.REST", 0.0)
    monkeypatch.setattr(families, "fit", lambda *given: fit(*given[:2], 3, *given[3:]))


def run(out: Path, *more: Any) -> Any:
    sizes = ("--seconds", 100, "--samples", 20, "--repeat", 2, "--budget", 1000, "--threads", 1)
    return bench("families", *sizes, "--out", out, *more)


@pytest.mark.slow
def test_end_to_end(tmp_path: Path) -> None:
    out, pixels = tmp_path / "run.json", np.random.default_rng(0).integers(0, 256, (2, 40, 1, 8, 8), np.uint8)
    np.savez(tmp_path / "pictures.npz", x_train=pixels[0], x_test=pixels[1])
    chosen = ("--family", "nice", "--family", "residual", "--data", "moons", "--data", "sphere", "--data", "images")
    result = run(out, *chosen, "--images", tmp_path / "pictures.npz")
    assert result.exit_code == 0, result.output
    made = record.read(out)
    labels = [(cell["label"]["data"], cell["label"]["family"]) for cell in made["cells"]]
    assert labels == [(data, family) for data in ("moons", "images") for family in ("nice", "residual")]
    assert made["settings"]["images"] == "pictures.npz"
    for cell in made["cells"]:
        assert cell["check"]["passed"]
        assert cell["steps"] == 3
        assert cell["training"] > 0
        assert cell["reconstruction"] < 1e-3
        assert (cell["bits"] is None) == (cell["label"]["data"] == "moons")
        sample, density = cell["runs"]
        assert (sample["name"], density["name"]) == ("sample", "density")
        assert sample["count"] == density["count"] == 20
        assert len(sample["seconds"]) >= 1
        assert (sample["evaluations"] is None) == (cell["label"]["family"] == "nice")
        assert density["evaluations"] is None
    assert SUITE.table(made) in result.output
    row = next(line for line in result.output.splitlines() if line.startswith("moons") and "residual" in line)
    assert f"{made['cells'][1]['parameters']:,}" in row
    with Image.open(out.with_suffix(".png")) as picture:
        picture.verify()
    panels = SUITE.figure(made).axes
    assert [axes.get_title() for axes in panels] == [f"{data}\n{family}" for data, family in labels]
    assert len(panels[0].lines[0].get_xdata()) == 20
    assert panels[3].images[0].get_array().shape == (16, 16)
    assert str(tmp_path) not in out.read_text()


def test_what_takes_long_is_reckoned_from_few(tmp_path: Path) -> None:
    result = run(tmp_path / "run.json", "--data", "moons", "--family", "nice", "--samples", 100, "--budget", 1e-9)
    assert result.exit_code == 0, result.output
    (cell,) = record.read(tmp_path / "run.json")["cells"]
    assert [(each["count"], len(each["seconds"])) for each in cell["runs"]] == [(5, 1), (5, 1)]
    assert unpack(cell["samples"]).shape == (5, 2)


def test_what_fails_is_told_and_costs_the_others_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def log_prob(self: NICE, x: Tensor, *rest: Any, **how: Any) -> Tensor:
        raise ValueError("no density today")

    monkeypatch.setattr(NICE, "log_prob", log_prob)
    result = run(tmp_path / "run.json", "--data", "moons", "--family", "nice", "--family", "realnvp")
    assert result.exit_code == 1
    assert "FAILED data moons, family nice: ValueError: no density today" in result.output
    first, second = record.read(tmp_path / "run.json")["cells"]
    assert first["runs"] == []
    assert len(second["runs"]) == 2


def test_samples_that_are_not_finite_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = NICE.sample
    monkeypatch.setattr(NICE, "sample", lambda *given, **how: right(*given, **how) * torch.nan)
    result = run(tmp_path / "run.json", "--data", "moons", "--family", "nice")
    assert result.exit_code == 1
    assert "ArgumentError: x: expected finite values" in result.output


def test_families_meet_the_data_that_they_take(tmp_path: Path) -> None:
    command = SUITE.command()
    for given, images in (([], False), (["--images", str(tmp_path)], True)):
        suite = families.Families()
        suite.chosen = SimpleNamespace(**command.make_context("families", given).params)
        cases = [(case.label["data"], case.label["family"]) for case in suite.cases()]
        assert (("images", "glow") in cases) == images
        assert ("images", "iaf") not in cases
        assert {family for data, family in cases if data == "moons"} == {
            name for name, family in FAMILIES.items() if "vectors" in family.kinds
        }


def model_and_data() -> tuple[FamilyFlow, FlowData]:
    torch.manual_seed(0)
    return build("nice", data_shape=(2,), couplings=3, hidden=(8,)), load_flow_data("moons")


def test_training_ends_with_its_time_or_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))  # a second passes from one look at the clock to the next
    monkeypatch.setattr("bench.suites.families.time.perf_counter", lambda: float(next(clock)))
    model, data = model_and_data()
    assert fit(model, data, 5, 100.0, 0) == 5
    assert fit(model, data, 1000, 3.0, 0) == 18  # six steps took one second
    assert fit(model, data, 1000, 0.1, 0) == families.TRIAL
    assert not model.training


def test_training_fits_and_repeats() -> None:
    losses = []
    for steps in (60, 60, 2):
        model, data = model_and_data()
        fit(model, data, steps, 1000.0, 0)
        losses.append(float(model.loss(data.values[:500]).detach()))
    assert losses[0] == losses[1] < losses[2]


@pytest.mark.parametrize("kind", ["vectors", "sphere", "images", "tokens"])
def test_samples_are_kept(kind: str) -> None:
    if kind == "tokens":
        tokens = torch.tensor([[0, 1, 2], [2, 1, 0]])
        data = FlowData(tokens, kind, symbols=("A", "C", "G"))
        assert pack(tokens, data) == ["ACG", "GCA"]
        assert pack(tokens, replace(data, symbols=None)) == ['!"#', '#"!']
        return
    if kind == "images":
        pictures = torch.arange(5 * 16).reshape(5, 1, 4, 4).byte()
        assert np.array_equal(unpack(pack(pictures.float(), FlowData(pictures, kind))), pictures[:4].numpy())
        return
    x = torch.nn.functional.normalize(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    kept = torch.from_numpy(unpack(pack(x, FlowData(x, kind))).astype(np.float32))
    wanted = torch.stack([torch.atan2(x[:, 1], x[:, 0]), x[:, 2]], 1) if kind == "sphere" else x[:, :2]
    assert torch.allclose(kept, wanted, atol=2e-3)
