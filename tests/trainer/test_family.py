"""A family is trained by the same loop as TarFlow: steps, resuming, files, monitoring, and what is refused."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from remarks import Remarks
from runs import Killed, kill, stop_at
from torch import Tensor

from tarflow_fast.data import load_flow_data
from tarflow_fast.errors import ArgumentError, TarFlowWarning
from tarflow_fast.evaluation import flow_score
from tarflow_fast.flows import Bijection, FamilyFlow, Preprocessed, build, load
from tarflow_fast.trainer import TrainConfig, continued, train
from tarflow_fast.trainer.flow_config import FlowConfig, defaults_for
from tarflow_fast.trainer.monitor import SETTLED, LayerMonitor

SMALL = FlowConfig("realnvp", (("couplings", 4), ("hidden", (16,))))


def small(out: Path, flow: FlowConfig = SMALL, data: str = "moons", **changes: Any) -> TrainConfig:
    """Returns the configuration of a run of 20 steps."""
    schedule = {"epochs": 1, "batch_size": 1000, "log_every": 5, "warmup_steps": 2, "eval_images": 500, "threads": 1}
    return TrainConfig.for_flow(flow, data=data, out=str(out), **{**schedule, **changes})


def rows(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def weights(model: FamilyFlow) -> Iterator[Tensor]:
    yield from model.state_dict().values()


def test_a_run_learns_and_writes_what_it_learnt(tmp_path: Path) -> None:
    model = train(small(tmp_path / "run", epochs=4, sample_every=80), progress=False)
    assert isinstance(model, Preprocessed)
    found, steps = load(tmp_path / "run" / "model.safetensors"), rows(tmp_path / "run" / "train.csv")
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(found), strict=True))
    assert found.metadata == {"kind": "vectors", "data": "moons", "steps": 80}
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.05
    assert steps[-1]["step"] == 80
    held_out = rows(tmp_path / "run" / "eval.csv")[0]
    score = flow_score(found, load_flow_data("moons", split="test").spread(500))
    assert held_out["log_prob"] == pytest.approx(score.log_prob, abs=1e-5)
    assert held_out["reconstruction"] == pytest.approx(score.reconstruction, abs=1e-5)
    assert (tmp_path / "run" / "samples" / "step_0000080.png").stat().st_size > 1000


def test_layers_tell_their_log_dets(tmp_path: Path) -> None:
    """Their sum is the model's log-det, whose mean is what the loss has beside the prior."""
    train(small(tmp_path / "run"), progress=False)
    row = rows(tmp_path / "run" / "layers.csv")[-1]
    names = [name for name in row if name != "step"]
    assert names == [f"flow.bijection.steps.{k}" for k in range(8)] + ["steps.steps.0"]
    data = load_flow_data("moons").values
    assert row["steps.steps.0"] == pytest.approx(float(-data.std(0, correction=0).log().sum()) / 2, abs=1e-4)


def test_a_resumed_run_is_the_run_that_went_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(small(tmp_path / "a"), progress=False)
    with monkeypatch.context() as patch:
        stop_at(patch, 13, kill)
        with pytest.raises(Killed):
            train(small(tmp_path / "b", checkpoint_every=10), progress=False)
    again = train(continued(tmp_path / "b", {}), resume=True, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))
    for name in ("train.csv", "eval.csv"):
        one, two = rows(tmp_path / "a" / name), rows(tmp_path / "b" / name)
        assert [{**row, "seconds": 0} for row in one] == [{**row, "seconds": 0} for row in two]
    with pytest.raises(
        ArgumentError, match=r"^flow: expected realnvp, couplings=4, hidden=16, as in .* got nice, logit=false$"
    ):
        continued(tmp_path / "b", {"flow": FlowConfig("nice", logit=False)})
    with pytest.raises(ArgumentError, match=r"got realnvp, couplings=9$"):
        continued(tmp_path / "b", {"flow": FlowConfig("realnvp", (("couplings", 9),))})


def test_a_run_starts_from_a_model(tmp_path: Path) -> None:
    first = train(small(tmp_path / "a"), progress=False)
    train(small(tmp_path / "b", epochs=1, lr=1e-9, min_lr=0.0), init=str(tmp_path / "a" / "model.safetensors"))
    found = load(tmp_path / "b" / "model.safetensors")
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights(first), weights(found), strict=True))
    with pytest.raises(ArgumentError, match=r"^init: expected a model like that of this run"):
        train(small(tmp_path / "c"), init=build("realnvp", data_shape=(2,)), progress=False)


def test_images_are_dequantised_and_labelled(tmp_path: Path) -> None:
    flow = FlowConfig("nice", (("couplings", "2"), ("hidden", "16")), dequantization="variational")
    config = small(tmp_path / "run", flow, "digits", conditional=True, batch_size=700, sample_every=2, drop_label=0.5)
    model = train(config, progress=False)
    assert (model.num_classes, model.options.dequantization) == (10, "variational")
    assert model.metadata["class_names"] == list("0123456789")
    assert rows(tmp_path / "run" / "eval.csv")[0]["bits_per_dim"] > 0
    assert (tmp_path / "run" / "samples" / "step_0000002.png").exists()


def test_vectors_of_a_file_are_brought_to_a_standard_scale(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(50, 20, (2000, 3)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    config = small(tmp_path / "run", data=str(tmp_path / "x.npy"), eval_data=str(tmp_path / "x.npy"), epochs=5)
    model = train(config, progress=False)
    assert float(model.sample(500).mean()) == pytest.approx(50, abs=5)
    gaussian = -0.5 * 3 * (1 + math.log(2 * math.pi * 20**2))
    assert rows(tmp_path / "run" / "eval.csv")[0]["log_prob"] == pytest.approx(gaussian, abs=1)


@pytest.mark.parametrize(
    ("flow", "data", "epochs"),
    [
        ("realnvp", "moons", 75),
        ("cnf", "moons", 8),
        ("realnvp", "breast-cancer", 200),
        ("iaf", "wine", 60),
        ("cnf", "breast-cancer", 200),
        ("realnvp", "digits", 150),
        ("realnvp", "vectors.npy", 100),
    ],
)
def test_only_generated_data_are_passed_more_often_for_a_family(flow: str, data: str, epochs: int) -> None:
    """A table of a few hundred rows is learnt by heart in three times its epochs."""
    assert defaults_for(flow, data)["epochs"] == epochs


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"flow": FlowConfig("glew")}, r"^flow: expected one of nice"),
        ({"flow": FlowConfig("nice", (("depth", 3),))}, r"^options: expected one of couplings, hidden for 'nice'"),
        ({"data": "dna"}, r"^data: expected vectors or images, which 'realnvp' takes, got tokens$"),
        ({"data": "digits", "flow": FlowConfig("realnvp", logit=False)}, r"^logit: expected True, as 8-bit data"),
        ({"flow": FlowConfig("nice", logit=False)}, r"^logit: expected True, as only 8-bit images are .*, got False$"),
        ({"flow": FlowConfig("nice", dequantization="variational")}, r"^dequantization: expected 'uniform', as only"),
        ({"flow": FlowConfig("nice", alpha=0.1)}, r"^alpha: expected 0\.05, as only 8-bit images"),
        ({"flow": FlowConfig("realnvp", (("scales", "2"),))}, r"^options: expected 'scales' with images alone"),
        ({"data": "checkerboard", "conditional": True}, r"^conditional: expected False, as the data has no labels"),
        ({"flip": True}, r"^flip: expected False, as vectors have no mirror image"),
        ({"channels": 64}, r"^channels: expected 512, its default, as 'realnvp' has no such option, got 64$"),
        ({"noise_std": 0.1}, r"^noise_std: expected 0\.05, its default"),
        ({"batch_size": 30_000}, r"^batch_size: expected at most 20000, the number of vectors"),
        ({"layout": "tokens"}, r"^layout: expected 'auto'"),
        (
            {"eval_data": "rings", "data": "wine", "batch_size": 9},
            r"^eval_data: expected vectors of shape \(13,\), got vectors \(2,\)$",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=said):
        train(small(tmp_path / "run", **changes), progress=False)


class _Leaping(Bijection):
    """A step whose log-det is `self.log_det`."""

    log_det = 0.1

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x, torch.full((len(x),), self.log_det)


def test_a_leap_of_a_log_det_is_told(remarks: Remarks) -> None:
    model = torch.nn.Sequential(_Leaping(), _Leaping())
    monitor = LayerMonitor(model, dims=2)
    assert monitor.names == ["0", "1"]
    for step in range(2 * SETTLED):
        for layer in model:
            layer(torch.zeros(3, 2))
            layer.log_det = 0.1 + 0.01 * (step % 2)
        monitor.step()
    row = monitor.row()
    assert row == pytest.approx({"0": 0.0525, "1": 0.0525}, abs=0.003)  # a value has half of a sample's
    assert not remarks.messages
    layer.log_det = 40.0
    layer(torch.zeros(3, 2))
    monitor.step()
    monitor.row()
    assert remarks.messages == ["log-det leapt, in nats per value: 1 by 19.9; lower lr"]
    monitor.row()
    assert len(remarks.messages) == 1


def test_an_inverse_that_is_far_off_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = build("nice", data_shape=(2,)), load_flow_data("moons", split="test").spread(50)
    score = flow_score(model, data)
    assert score.reconstruction is not None
    assert score.reconstruction < 1e-5
    plain = model.inverse
    monkeypatch.setattr(model, "inverse", lambda z, y=None: (plain(z, y)[0] + 0.01, 0))
    with pytest.warns(TarFlowWarning, match=r"^reconstruction: max .* is 0\.01, above 0\.001"):
        flow_score(model, data)
