"""`bench families`: which families meet which data, how long they are trained, and the suite from end to end."""

from __future__ import annotations

import functools
import itertools
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

from bench.common import harness, record
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
    sizes = ("--seconds", 100, "--image-seconds", 100, "--samples", 20, "--repeat", 2, "--budget", 1000, "--threads", 1)
    return bench("families", *sizes, "--out", out, *more)


@pytest.mark.slow
def test_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "matrix_rate", functools.cache(families.matrix_rate))  # takes seconds each time
    out, pixels = tmp_path / "run.json", np.random.default_rng(0).integers(0, 256, (2, 40, 1, 8, 8), np.uint8)
    np.savez(tmp_path / "pictures.npz", x_train=pixels[0], x_test=pixels[1])
    names = ("nice", "residual", "flow-matching")
    chosen = tuple(part for name in names for part in ("--family", name))
    chosen += ("--data", "moons", "--data", "sphere", "--data", "images")
    result = run(out, *chosen, "--images", tmp_path / "pictures.npz")
    assert result.exit_code == 0, result.output
    made = record.read(out)
    labels = [(cell["label"]["data"], cell["label"]["family"]) for cell in made["cells"]]
    assert labels == [(data, family) for data in ("moons", "images") for family in names]
    assert made["settings"]["images"] == "pictures.npz"
    for cell in made["cells"]:
        assert cell["check"]["passed"]
        assert all(0 < part["fraction_of_limit"] < 1 for part in cell["runs"])
        assert cell["steps"] == 3
        assert cell["training"] > 0
        assert cell["reconstruction"] < 1e-2
        assert cell["held_out"] == 20
        of_ode = cell["label"] == {"data": "images", "family": "flow-matching"}
        assert cell["options"] == ({"solver": "midpoint", "steps": 16} if of_ode else {})
        assert (cell["bits"] is None) == (cell["label"]["data"] == "moons")
        sample, density = cell["runs"]
        assert (sample["name"], density["name"]) == ("sample", "density")
        assert sample["count"] == density["count"] == 20
        assert len(sample["seconds"]) >= 1
        assert (sample["evaluations"] is None) == (cell["label"]["family"] == "nice")
        assert (density["evaluations"] is None) == (cell["label"]["family"] != "flow-matching")
        if of_ode:
            assert (sample["evaluations"], density["evaluations"]) == (32, 32)
    assert SUITE.table(made) in result.output
    row = next(line for line in result.output.splitlines() if line.startswith("moons") and "residual" in line)
    assert f"{made['cells'][1]['parameters']:,}" in row
    nice = next(line for line in result.output.splitlines() if line.startswith("| `nice` | The simplest exact flow"))
    moons, images = (cell for cell in made["cells"] if cell["label"]["family"] == "nice")
    assert f"| {moons['log_prob']:.2f} | {images['bits']:.2f} |" in nice
    costs = [" / ".join(f"{run['median']:.3g}" for run in cell["runs"]) for cell in (moons, images)]
    assert nice.endswith(f"| {costs[0]} s | {costs[1]} s |")
    with Image.open(out.with_suffix(".png")) as picture:
        picture.verify()
    panels = SUITE.figure(made).axes
    assert [axes.get_title() for axes in panels] == [f"{data}\n{family}" for data, family in labels]
    assert len(panels[0].lines[0].get_xdata()) == 20
    assert panels[-1].images[0].get_array().shape == (16, 16)
    assert str(tmp_path) not in out.read_text()


def test_what_takes_long_is_reckoned_from_few(tmp_path: Path) -> None:
    result = run(tmp_path / "run.json", "--data", "moons", "--family", "nice", "--samples", 100, "--budget", 1e-9)
    assert result.exit_code == 0, result.output
    made = record.read(tmp_path / "run.json")
    (cell,) = made["cells"]
    assert [(each["count"], len(each["seconds"])) for each in cell["runs"]] == [(1, 1), (1, 1)]
    assert cell["held_out"] == 2
    assert unpack(cell["samples"]).shape == (1, 2)
    assert "* from fewer than 100 samples" in result.output
    for run_of in cell["runs"]:
        assert f"{run_of['median']:.3g}*" in SUITE.table(made)


def test_as_many_are_timed_as_twice_the_budget_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    now, counts = [0.0], list[int]()

    def draw(count: int) -> Tensor:
        counts.append(count)
        now[0] += count / 128  # seconds
        return torch.zeros(count, 2)

    def timed(budget: float) -> tuple[list[int], Any]:
        counts.clear()
        suite = families.Families()
        suite.chosen = SimpleNamespace(samples=1000, repeat=3, budget_seconds=budget)
        made, told = suite._timed("sample", build("nice", data_shape=(2,)), draw)
        assert len(made) == told["count"]
        assert told["median"] == pytest.approx(1000 / 128)
        return counts, told["count"]

    monkeypatch.setattr(harness.Rounds, "seconds", lambda self, run: harness.wall(run, lambda: now[0]))
    assert timed(1 / 32) == ([1, 1, 8], 8)
    assert timed(25 / 32) == ([1, 1, 16, 200], 200)
    counts, count = timed(100.0)
    assert counts == [1, 1, 16, 256, 1000, 1000, 1000, 1000]
    assert count == 1000


@pytest.mark.slow
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


@pytest.mark.slow
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
    clock = itertools.count()  # a second passes from one look at the clock to the next
    monkeypatch.setattr("bench.suites.families.time.perf_counter", lambda: float(next(clock)))
    model, data = model_and_data()
    stages: list[float] = []
    model.at_step = lambda step, steps: stages.append(step / steps)  # type: ignore[method-assign]
    assert fit(model, data, 5, 100.0, 0) == 5
    assert stages == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    stages.clear()
    assert fit(model, data, 1000, 4.0, 0) == 4
    assert stages == pytest.approx([0, 0.25, 0.5, 0.75])
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


@pytest.mark.parametrize(
    ("name", "options", "passes"),
    [
        ("nice", {"couplings": 3, "hidden": (16,)}, 1),
        ("maf", {"transforms": 3, "hidden": (16,)}, 1),
        ("iaf", {"transforms": 3, "hidden": (16,)}, 1),
        ("flow-matching", {"width": 16, "blocks": 1, "octaves": 0, "solver": "euler", "steps": 3}, 3),
    ],
)
def test_operations_are_those_of_one_pass_through_each_network(name: str, options: dict[str, Any], passes: int) -> None:
    """Two for each weight, of masked networks too, in the direction that takes one pass; three steps are three."""
    model = build(name, data_shape=(3,), **options).eval().requires_grad_(False)
    weights = sum(w.numel() for w in model.parameters() if w.dim() == 2)
    timed = {"evaluations": None if passes == 1 else passes}
    found = families.flops_of(lambda: model.sample(families.COUNTED), model, timed)
    assert found == 2 * passes * weights * families.PER


def test_records_without_a_limit_show_none() -> None:
    made = record.read(Path(families.__file__).parents[1] / "results" / "families.json")
    for cell in made["cells"]:
        for part in cell["runs"]:
            part.pop("fraction_of_limit", None)
    lines = SUITE.table(made).splitlines()[1:3]
    assert "of limit" in lines[0]
    assert " - " in lines[1]
